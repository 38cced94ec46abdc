# Copyright 2026 The hfcompress authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A teacher behind a completions endpoint: a small server that speaks as vLLM and llama.cpp do, with a real model behind it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids

import hfcompress as hfc
from hfcompress.distillation.divergences import Divergence
from hfcompress.distillation.endpoint import KEY, NOBODY, Endpoint
from hfcompress.distillation.signals import Largest
from hfcompress.errors import CheckpointError, InvalidValueError
from hfcompress.hub.card import make_card
from hfcompress.hub.published import published
from hfcompress.models.batch import Batch
from hfcompress.recipes import job_from_dict


IDS = token_ids(6, 10)
SIZE = 12


class Tokenizer:
    """Every id a word of its own, but for two of the same text."""

    def get_vocab(self) -> dict[str, int]:
        return {f"w{number}": number for number in range(128)}

    def decode(self, ids: list[int]) -> str:
        return "same" if ids[0] in (3, 4) else f" w{ids[0]}"


class Server(ThreadingHTTPServer):
    """Answers with what a model says; `spelled(id)` is how it writes a token, `fails` the status of the next answers."""

    def __init__(self, model, spelled):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.spelled, self.fails, self.change, self.seen = model, spelled, [], lambda answer: answer, []
        self.elsewhere = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        if self.server.elsewhere:
            self.send_response(302)
            self.send_header("Location", self.server.elsewhere)
            self.end_headers()
            return
        if self.server.fails:
            self.send_error(self.server.fails.pop(0), "no")
            return
        ids = torch.tensor(body["prompt"])[None]
        with torch.no_grad():
            log_probs = self.server.model(ids).logits[0].log_softmax(-1)
        top = log_probs.topk(body["logprobs"])
        spelled = self.server.spelled
        told = [
            {spelled(i): p for i, p in zip(row.tolist(), values.tolist(), strict=True)}
            for row, values in zip(top.indices, top.values, strict=True)
        ]
        tokens = [spelled(i) for i in [*body["prompt"], int(top.indices[-1, 0])]]
        answer = {"choices": [{"text": "", "logprobs": {"tokens": tokens, "top_logprobs": [None, *told]}}]}
        text = json.dumps(self.server.change(answer)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIGS["llama"]())


@pytest.fixture
def serve(model):
    servers = []

    def start(spelled) -> Server:
        servers.append(Server(model, spelled))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def by_id(number: int) -> str:
    return f"token_id:{number}"


def by_text(number: int) -> str:
    return Tokenizer().decode([number])


def said(server: Server, tokenizer=None, model="teacher") -> dict[str, torch.Tensor]:
    endpoint = Endpoint(server.url, model, tokenizer, SIZE, wait=0.01)
    return next(endpoint.say([Batch(torch.from_numpy(IDS))]))


def test_what_it_says_is_what_the_model_says(serve, model, monkeypatch):
    """As the model in memory, told by ids; and failing for a moment is no failure."""
    monkeypatch.setenv(KEY, "secret")
    server = serve(by_id)
    server.fails = [503, 429]
    found = said(server)
    with torch.no_grad():
        wanted = Largest.of(model(torch.from_numpy(IDS)).logits, SIZE, torch.Generator())
    assert torch.equal(found["ids"], wanted["ids"])
    torch.testing.assert_close(found["log_probs"], wanted["log_probs"])
    torch.testing.assert_close(found["rest"], wanted["rest"], rtol=1e-4, atol=1e-4)
    assert len(server.seen) == len(IDS) + 2
    path, body, key = server.seen[-1]
    assert (path, body["model"], key) == ("/v1/completions", "teacher", "Bearer secret")


def test_padding_is_not_sent(serve):
    """On either side; what is said of the rest is what is said of the row alone."""
    server = serve(by_id)
    whole = said(server)
    ids, mask = torch.zeros(1, 14, dtype=torch.long), torch.zeros(1, 14, dtype=torch.bool)
    ids[0, 3:13], mask[0, 3:13] = torch.from_numpy(IDS[0]), True
    found = next(Endpoint(server.url, "teacher", None, SIZE).say([Batch(ids, mask)]))
    assert server.seen[-1][1]["prompt"] == IDS[0].tolist()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor[0, 3:13], whole[name][0])


def test_a_key_is_not_sent_elsewhere(serve, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    other, server = serve(by_id), serve(by_id)
    server.elsewhere = other.url
    with pytest.raises(InvalidValueError, match="refused with 302"):
        said(server)
    assert not other.seen


def test_another_tokenizer_is_another_teacher():
    found = [Endpoint("http://x", "m", tokenizer, 4).described for tokenizer in (Tokenizer(), None)]
    assert found[0]["teacher"] == found[1]["teacher"]
    assert found[0]["tokenizer"] != found[1]["tokenizer"]


def test_texts_that_mean_two_tokens_belong_to_the_rest(serve, model):
    found = said(serve(by_text), Tokenizer())
    with torch.no_grad():
        logits = model(torch.from_numpy(IDS)).logits
        wanted = Largest.of(logits, SIZE, torch.Generator())
    lost = torch.isin(wanted["ids"], torch.tensor([3, 4]))
    assert lost.any()
    mass = wanted["log_probs"].exp().masked_fill(lost, 0.0).sum(-1)
    torch.testing.assert_close(found["rest"].exp(), 1 - mass, rtol=1e-4, atol=1e-5)
    assert not torch.isin(found["ids"], torch.tensor([3, 4])).any()
    assert (found["ids"] == NOBODY).sum() == lost.sum()
    told = {name: tensor.flatten(0, 1) for name, tensor in found.items()}
    student = logits.flatten(0, 1) + torch.randn(
        logits.flatten(0, 1).shape, generator=torch.Generator().manual_seed(0)
    )
    heard = Largest()(told, student, Divergence())
    whole = Divergence()(logits.flatten(0, 1), student)
    assert heard.isfinite().all()
    assert (heard <= whole + 1e-4).all()  # merging outcomes can only bring them nearer


def test_a_student_learns_from_it(serve, model, tmp_path):
    """The same as from the original's own cache."""
    model.save_pretrained(tmp_path / "base")
    server = serve(by_id)
    common = {
        "student": {"every": 2},
        "signal": "top_k",
        "signal_size": SIZE,
        "steps": 6,
        "batch_size": 2,
        "held_out": 2,
    }
    found = []
    for name, teacher in {"own": None, "served": {"url": server.url, "model": "teacher"}}.items():
        step = hfc.Distill(**common, teacher=teacher, teacher_cache=str(tmp_path / name))
        result = hfc.compress(tmp_path / "base", step, tmp_path / f"out-{name}", calibration=IDS, evaluate=False)
        found.append(result.manifest["training"])
    assert found[1]["held_out_kl"] < found[1]["held_out_kl_start"]
    assert found[1]["held_out_kl"] == pytest.approx(found[0]["held_out_kl"], rel=1e-3)
    assert "trained on the most probable tokens of teacher, 6 steps" in make_card(result.manifest, {}, "out").content
    told, _ = published(result.manifest, {})
    assert server.url not in json.dumps(told)
    job_from_dict(told["recipe"])
    assert "secret" not in (tmp_path / "out-served" / "hfcompress.json").read_text()


def test_what_cannot_be_is_told(serve, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    server = serve(by_id)
    server.fails = [401] * 9
    with pytest.raises(InvalidValueError, match="wants a key; set OPENAI_API_KEY"):
        said(server)
    server.fails = [400] * 9
    with pytest.raises(
        InvalidValueError, match=r"refused with 400 .*check distill\.teacher\.model and distill\.signal_size"
    ):
        said(server)
    server.fails = []
    server.change = lambda answer: {"choices": [{"text": "", "logprobs": None}]}
    with pytest.raises(CheckpointError, match="told no log-probabilities of the prompt"):
        said(server)
    server.change = lambda answer: answer
    server.spelled = lambda number: by_id(number + 1)
    with pytest.raises(CheckpointError, match="has another tokenizer: it answered 'token_id:"):
        said(server)
    server.spelled = by_id
    server.change = lambda answer: {"choices": [{"logprobs": {"tokens": [], "top_logprobs": []}}]}
    with pytest.raises(CheckpointError, match="it answered 0 tokens of a row of 10"):
        said(server)
    with pytest.raises(InvalidValueError, match=r"cannot be reached .* check distill\.teacher\.url"):
        next(Endpoint("http://127.0.0.1:9/v1", "teacher", None, 4, wait=0.001).say([Batch(torch.from_numpy(IDS))]))
    with pytest.raises(InvalidValueError, match=r"distill\.teacher has other keys than url and model"):
        hfc.Distill(student={"every": 2}, signal="top_k", teacher={"address": "x"})
    with pytest.raises(InvalidValueError, match=r"distill\.teacher\.url is localhost; it must begin with http"):
        hfc.Distill(student={"every": 2}, signal="top_k", teacher={"url": "localhost", "model": "m"})
    with pytest.raises(InvalidValueError, match=r"distill\.teacher\.url holds a password"):
        hfc.Distill(student={"every": 2}, signal="top_k", teacher={"url": "http://me:secret@host/v1", "model": "m"})
    with pytest.raises(InvalidValueError, match="tells its most probable tokens alone; set signal=top_k"):
        hfc.Distill(student={"every": 2}, teacher={"url": "http://localhost", "model": "m"})
