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
"""Calibration from every source: full rows, seeded, hashed, within the vocabulary and the context."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from hfcompress.calibration.overlap import overlap, sketch
from hfcompress.calibration.reference_text import reference_text
from hfcompress.calibration.sources import read_texts
from hfcompress.calibration.tokens import load_tokens
from hfcompress.models.checkpoint import Checkpoint


TEXT = "\n".join(f"Line {i}: the quick brown fox does {i * i} things before breakfast." for i in range(400))


@pytest.fixture
def checkpoint(tiny):
    return Checkpoint.open(tiny)


def decoded(checkpoint, tokens) -> str:
    return checkpoint.tokenizer.decode(tokens.input_ids.flatten())


@pytest.fixture(params=["txt", "jsonl", "messages", "parquet"])
def source(request, tmp_path, checkpoint):
    path = tmp_path / f"data.{'jsonl' if request.param == 'messages' else request.param}"
    if request.param == "txt":
        path.write_text(TEXT)
    elif request.param == "jsonl":
        path.write_text("\n".join(json.dumps({"text": line}) for line in TEXT.split("\n")))
    elif request.param == "messages":
        checkpoint.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
        rows = [{"messages": [{"role": "user", "content": line}]} for line in TEXT.split("\n")]
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pa.parquet.write_table(pa.table({"text": TEXT.split("\n")}), path)
    return str(path)


def test_local_files_are_packed_to_full_rows(checkpoint, source):
    tokens = load_tokens(source, checkpoint, samples=8, seq_len=64)
    assert tokens.input_ids.shape == (8, 64)
    assert tokens.mask is None
    assert "quick brown fox" in decoded(checkpoint, tokens)


def test_a_chat_begins_and_ends_as_the_template_says(checkpoint, tmp_path):
    """A template writes the first token itself, and a tokenizer that adds one as well would have the model see two."""
    tokenizer = checkpoint.tokenizer
    first = tokenizer.convert_ids_to_tokens(1)
    tokenizer.chat_template = first + "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "words " * 40}]}
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 8))
    chat = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
    tokens = load_tokens(str(path), checkpoint, samples=1, seq_len=len(chat))
    assert tokens.input_ids[0].tolist() == chat
    assert chat.count(1) == 1
    assert 2 not in chat


def test_messages_are_rendered_with_the_chat_template(checkpoint, tmp_path):
    checkpoint.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "words " * 80}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))
    [ids] = read_texts(str(tmp_path / "chat.jsonl"), checkpoint.tokenizer)
    assert checkpoint.tokenizer.decode(ids) == "<user> " + "words " * 80


def test_the_seed_decides_and_the_hash_tells(checkpoint, tmp_path):
    (tmp_path / "data.txt").write_text(TEXT)
    draws = [load_tokens(str(tmp_path / "data.txt"), checkpoint, samples=8, seq_len=64, seed=s) for s in (0, 0, 1)]
    assert draws[0].sha256 == draws[1].sha256
    assert np.array_equal(draws[0].input_ids, draws[1].input_ids)
    assert draws[0].sha256 != draws[2].sha256


def test_seq_len_is_capped_at_the_context(checkpoint, tmp_path):
    (tmp_path / "data.txt").write_text(TEXT)
    assert load_tokens(str(tmp_path / "data.txt"), checkpoint, samples=4).input_ids.shape == (4, 256)


def test_the_tiny_models_own_arrays(checkpoint, tiny):
    tokens = load_tokens("bundled", checkpoint, tiny_folder=tiny)
    assert np.array_equal(tokens.input_ids, np.load(tiny / "calibration.npy"))
    assert tokens.note == ""
    cut = load_tokens("bundled", checkpoint, tiny_folder=tiny, samples=5, seq_len=100)
    assert np.array_equal(cut.input_ids, tokens.input_ids[:5, :100])


def test_for_another_model_bundled_is_the_reference_text_with_a_word_of_advice(checkpoint):
    calibration = load_tokens("bundled", checkpoint, samples=32, seq_len=128)
    evaluation = load_tokens("bundled", checkpoint, split="evaluation", samples=32, seq_len=128)
    assert "a data set like the model's use is better" in calibration.note
    assert overlap(evaluation, sketch(calibration)) < 0.01
    assert decoded(checkpoint, calibration)[:200] in "<|end|>".join(reference_text("calibration"))


def test_the_reference_texts_splits_share_no_paragraph():
    calibration, evaluation = (
        {p for text in reference_text(split) for p in text.split("\n\n") if p.strip()}
        for split in ("calibration", "evaluation")
    )
    assert len(calibration) > 500
    assert len(evaluation) > 100
    assert not calibration & evaluation


def test_an_array_is_used_as_it_is_unless_cut_by_hand(checkpoint, tmp_path):
    array = np.arange(300, dtype=np.uint16).reshape(10, 30)
    np.save(tmp_path / "ids.npy", array)
    whole = load_tokens(str(tmp_path / "ids.npy"), checkpoint, default_samples=3, default_seq_len=7)
    assert np.array_equal(whole.input_ids, array)
    cut = load_tokens(str(tmp_path / "ids.npy"), checkpoint, samples=4, seq_len=8)
    assert np.array_equal(cut.input_ids, array[:4, :8])
