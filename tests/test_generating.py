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
"""What a checkpoint says, against plain transformers, and what cannot be asked of it."""

import shutil

import pytest
import torch
from conftest import MIXTURES, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfcompress as hfc
from hfcompress import cli
from hfcompress.errors import HfcompressError, InvalidValueError
from hfcompress.generating import generate
from hfcompress.runtime.loading import load_checkpoint
from hfcompress.runtime.stored_linear import PackedLinear


PROMPT = "The built-in function"


def plainly(folder, prompt: str, **options) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = model.generate(ids, do_sample=False, pad_token_id=tokenizer.eos_token_id, **options)
    return tokenizer.decode(found[0, len(ids[0]) :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["dense", "w4", "entropy"])
def test_it_says_what_plain_transformers_says_piece_by_piece(tiny, tiny_w4, tmp_path, kind):
    folder = {"dense": tiny, "w4": tiny_w4.output_dir}.get(kind)
    if folder is None:
        folder = hfc.compress(
            None,
            hfc.Job(steps=(hfc.Entropy(bits=4.0),), format="hfcompress"),
            tmp_path / "out",
            samples=8,
            evaluate=False,
        ).output_dir
    pieces: list[str] = []
    found = generate(folder, PROMPT, max_new_tokens=24, dtype="float32", say=pieces.append)
    assert "".join(pieces) == found.text == plainly(folder, PROMPT, max_new_tokens=24)
    assert len(pieces) > 3
    assert found.tokens == 24
    assert found.text.strip()


def test_draws_follow_the_seed(tiny):
    said = [generate(tiny, PROMPT, max_new_tokens=16, temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_a_chat_template_is_used_unless_it_is_to_be_left_out(tiny, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}def {{ m.content }}(self):{% endfor %}"
    tokenizer.save_pretrained(folder)
    chat, plain = (generate(folder, "close", max_new_tokens=12, plain=plain).text for plain in (False, True))
    assert chat == plainly(tiny, "def close(self):", max_new_tokens=12)
    assert plain == plainly(tiny, "close", max_new_tokens=12) != chat


def test_no_more_is_said_than_there_is_room_for(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompt = PROMPT + " is" * 245
    room = 256 - len(tokenizer(prompt)["input_ids"])
    assert 0 < room < 20
    assert generate(tiny, prompt, max_new_tokens=100).tokens == room


def test_a_model_in_memory_talks(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=8).text == plainly(
        tiny, PROMPT, max_new_tokens=8
    )


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ("", {}, "The prompt is empty"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (PROMPT, {"temperature": -1.0}, "temperature is -1"),
        (PROMPT + " is" * 400, {}, "has room for 256; give a shorter one"),
        (PROMPT, {"device": "tpu"}, "There is no device 'tpu'"),
        (PROMPT, {"dtype": "int4"}, "There is no dtype 'int4'"),
    ],
)
def test_what_cannot_be_asked(tiny, prompt, options, reason):
    with pytest.raises(InvalidValueError, match=reason):
        generate(tiny, prompt, **options)


def test_without_a_tokenizer_there_is_no_text(tmp_path):
    make_model(MIXTURES["mixtral"]()).save_pretrained(tmp_path)
    with pytest.raises(HfcompressError, match="has no tokenizer, so it cannot be given text"):
        generate(tmp_path, PROMPT)


def test_the_command_puts_the_text_alone_on_stdout(tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hfcompress", "generate", str(tiny), PROMPT, "--max-new-tokens", "12"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    said = capsys.readouterr()
    assert said.out == plainly(tiny, PROMPT, max_new_tokens=12) + "\n"
    assert "12 tokens in " in said.err


def test_the_command_refuses_in_a_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["hfcompress", "generate", str(tmp_path / "nowhere"), PROMPT])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err


def test_what_can_stay_packed_does(tiny_w4, monkeypatch):
    loaded = []

    def watched(*arguments):
        loaded.append(load_checkpoint(*arguments))
        return loaded[-1]

    monkeypatch.setattr("hfcompress.generating.load_checkpoint", watched)
    said = generate(tiny_w4.output_dir, "The value of", max_new_tokens=8, device="cpu")
    assert said.tokens == 8
    assert any(isinstance(module, PackedLinear) for module in loaded[0].modules())
    generate(tiny_w4.output_dir, "The value of", max_new_tokens=2, device="cpu", dtype="float32")
    assert len(loaded) == 1
