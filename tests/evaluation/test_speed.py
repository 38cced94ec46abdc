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
"""Speed: what is counted against formulas worked by hand, and how a failing process is told of."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from transformers import AutoModelForCausalLM, MixtralConfig

from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import HfcompressError
from hfcompress.evaluation import fresh_process, speed
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.fresh_process import Request, run
from hfcompress.evaluation.probe import generate
from hfcompress.models.checkpoint import Checkpoint


class Steps:
    """Counts what progress is told."""

    def __init__(self):
        self.total = 0

    def start(self, total):
        pass

    def step(self, description, amount=1):
        self.total += amount

    def note(self, message):
        pass


@pytest.fixture(scope="module")
def comparison(tiny, tiny_w4):
    return Comparison(
        candidate=Checkpoint.open(tiny_w4.output_dir),
        baseline=Checkpoint.open(tiny),
        tokens=Tokens(token_ids(4, 64), "random"),
        seconds=0.2,
        progress=Steps(),
    )


@pytest.fixture(scope="module")
def report(comparison):
    return speed.measure(comparison)


def request_for(folder) -> Request:
    return Request(
        measurement="speed",
        folder=str(folder),
        trust_remote_code=False,
        device="cpu",
        dtype="float32",
        threads=1,
        prompts=[[1, 2, 3]],
        new_tokens=2,
    )


def fake_probe(folder, code: str) -> dict[str, str]:
    """An environment in which the child process runs `code` in place of hfcompress's own probe."""
    package = folder / "hfcompress" / "evaluation"
    package.mkdir(parents=True)
    (package / "probe.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def test_report_is_whole_finite_and_told_of(comparison, report):
    assert comparison.progress.total == speed.units(comparison) == 6
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for key in ("baseline", "compressed", "packed"):
        assert set(report[key]["batches"]) == {"1", "8"}
        assert min(report["how"]["repeats"][key].values()) >= 3
        for figures in report[key]["batches"].values():
            assert all(math.isfinite(value) and value > 0 for value in figures.values())
            assert figures["latency_p50_ms"] <= figures["latency_p90_ms"]
    how = report["how"]
    assert (how["prompt_length"], how["new_tokens"], how["rounds"]) == (128, 33, 2)
    assert how["versions"]["torch"] == torch.__version__
    assert how["attention"] == {"baseline": "sdpa", "compressed": "sdpa", "packed": "sdpa"}
    assert how["packed"] == "the compressed model again, loaded by hfcompress.load in bfloat16"
    assert how["note"].endswith("what computes on the packed weights, hfcompress.load, stands beside it.")


def test_a_packed_model_has_the_parameters_and_flops_of_its_base(tiny, report):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for key in ("baseline", "compressed"):
        assert report[key]["parameters"] == model.num_parameters()
        assert report[key]["flops_per_token"] == pytest.approx(llama_flops(model.config, 128), rel=0.01)


def llama_flops(config, length: int) -> float:
    """Two per weight of every linear, the head included, and two products of each query with all `length` keys."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = config.hidden_size * size * (2 * heads + 2 * kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    head = config.hidden_size * config.vocab_size
    products = 2 * heads * size * length
    return 2 * (config.num_hidden_layers * (attention + mlp + products) + head)


def test_decompression_is_said_only_where_it_was_seen(comparison, report):
    assert "on its first forward" in report["how"]["note"]

    def note(candidate, before, after):
        readings = {
            "baseline": [{"tensor_bytes": 800, "tensor_bytes_after_forward": 800, "attention": "sdpa"}],
            "compressed": [{"tensor_bytes": before, "tensor_bytes_after_forward": after, "attention": "sdpa"}],
        }
        pair = Comparison(candidate=candidate, baseline=comparison.baseline, tokens=comparison.tokens)
        return fresh_process.circumstances(pair, readings).get("note")

    assert "while it loads (804 bytes" in note(comparison.candidate, 804, 804)
    assert note(comparison.candidate, 200, 200) is None
    assert note(comparison.baseline, 800, 800) is None


def test_parameters_are_counted_as_transformers_counts_them(any_model):
    parameters, flops = speed.count(Checkpoint.open(any_model), 32)
    assert parameters == any_model.num_parameters()
    assert flops > 0


def test_only_the_experts_that_a_token_uses_are_counted():
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    per_layer = 64 * 16 * (2 * 4 + 2 * 2) + 2 * 3 * 64 * 96 + 64 * 4 + 2 * 4 * 16 * 32
    _, flops = speed.count(Checkpoint.open(make_model(config)), 32)
    assert flops == pytest.approx(2 * (2 * per_layer + 64 * 128), rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_is_greedy_generation(name):
    model = make_model(CONFIGS[name]())
    prompts = torch.from_numpy(token_ids(2, 12))
    generation = generate(model, prompts, 20)
    model.generation_config.eos_token_id = None  # ours goes on past it
    expected = model.generate(prompts, do_sample=False, max_new_tokens=20, attention_mask=torch.ones_like(prompts))
    assert torch.equal(generation.tokens, expected[:, 12:])
    assert len(generation.step_seconds) == 19


def test_figures_of_known_seconds():
    runs = [
        {"prefill_seconds": 2.0, "step_seconds": [0.1, 0.3]},
        {"prefill_seconds": 4.0, "step_seconds": [0.2, 0.2]},
        {"prefill_seconds": 1.0, "step_seconds": [0.5, 0.3]},
    ]
    figures = speed.figures(runs, batch=8, length=10)
    prefill = np.array([40.0, 20.0, 80.0])
    decode = np.array([40.0, 40.0, 20.0])
    assert figures["prefill_tokens_per_second"] == pytest.approx(prefill.mean())
    assert figures["prefill_stderr"] == pytest.approx(np.sqrt(((prefill - prefill.mean()) ** 2).sum() / 2 / 3))
    assert figures["decode_tokens_per_second"] == pytest.approx(decode.mean())
    assert figures["decode_stderr"] == pytest.approx(np.sqrt(((decode - decode.mean()) ** 2).sum() / 2 / 3))
    assert figures["latency_p50_ms"] == pytest.approx(250)  # between 200 and 300
    assert figures["latency_p90_ms"] == pytest.approx(400)  # between 300 and 500


def test_prompts_are_the_text_without_padding_and_again_where_it_is_short():
    mask = np.array([[True, True, False], [True, True, True]])
    tokens = Tokens(np.array([[1, 2, 0], [3, 4, 5]]), "ids", mask)
    assert fresh_process.prompts(tokens, 2, 4) == [[1, 2, 3, 4], [5, 1, 2, 3]]


def test_a_model_in_memory_is_saved_as_it_is(llama):
    before = llama.config.to_dict()
    with fresh_process.folder_of(Checkpoint.open(llama)) as folder:
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.from_numpy(token_ids(2, 8))
        assert torch.equal(again(ids).logits, llama(ids).logits)
    assert not folder.exists()
    assert llama.config.to_dict() == before


def test_lost_weights_end_in_one_sentence(saved_llama):
    (saved_llama / "model.safetensors").unlink()
    with pytest.raises(HfcompressError, match=r"^The speed of mine could not be measured: .*safetensors") as caught:
        run(request_for(saved_llama), "mine")
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_in_the_process_ends_in_one_sentence_with_its_last_line(tmp_path):
    environment = fake_probe(tmp_path, "raise RuntimeError('not enough memory.')")
    with pytest.raises(HfcompressError) as caught:
        run(request_for(tmp_path), "mine", environment)
    assert str(caught.value) == (
        "The speed of mine could not be measured: RuntimeError: not enough memory; see that the model loads and "
        "generates with plain transformers, or leave speed out of --measure."
    )


def test_a_process_that_was_killed_ends_in_one_sentence(tmp_path):
    environment = fake_probe(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(HfcompressError) as caught:
        run(request_for(tmp_path), "mine", environment)
    assert str(caught.value) == (
        "The speed of mine could not be measured: its process was ended by SIGKILL, as when memory runs out; free some "
        "memory, or leave speed out of --measure."
    )
