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
"""The texts that a report shows beside each other are what the two models write."""

import numpy as np
import torch
from conftest import CONFIGS, make_model, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfcompress as hfc
from hfcompress.calibration.tokens import Tokens
from hfcompress.evaluation import side_by_side
from hfcompress.evaluation.comparison import Comparison
from hfcompress.models.checkpoint import Checkpoint


def test_they_are_what_plain_transformers_generates(tiny, tiny_w4):
    shown = tiny_w4.report["generations"]
    assert len(shown) == side_by_side.PROMPTS
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = np.load(tiny / "evaluation.npy")[:, : side_by_side.PROMPT_TOKENS].astype(np.int64)
    prompts = {tokenizer.decode(row.tolist()): torch.from_numpy(row)[None] for row in rows}
    for name, folder in (("baseline", tiny), ("compressed", tiny_w4.output_dir)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for example in shown:
            ids = prompts[example["prompt"]]
            written = model.generate(
                ids, do_sample=False, max_new_tokens=side_by_side.NEW_TOKENS, min_new_tokens=side_by_side.NEW_TOKENS
            )
            text = tokenizer.decode(written[0, ids.shape[1] :])
            assert text == example[name]
    page = (tiny_w4.output_dir / "report.html").read_text()
    assert "Generations" in page


def test_nothing_where_it_would_not_fit(llama, monkeypatch):
    checkpoint = Checkpoint.open(llama)
    comparison = Comparison(candidate=checkpoint, baseline=checkpoint, tokens=Tokens(token_ids(2, 16), "test"))
    [first, _] = side_by_side.side_by_side(comparison)
    assert first["baseline"] == first["compressed"]
    assert len(first["baseline"].split()) == side_by_side.NEW_TOKENS  # ids, where there is no tokenizer
    monkeypatch.setattr(side_by_side, "CPU_WEIGHTS", 10)
    assert side_by_side.side_by_side(comparison) is None


def test_a_memory_limit_loads_nothing_whole(tiny, tmp_path):
    limited = hfc.compress(None, "rtn-w8a16", tmp_path / "out", memory_limit=8_000_000_000)
    assert "generations" not in limited.report


def test_no_more_is_written_than_there_are_positions_for():
    """OPT learns a vector for every position, and has none for more."""
    config = CONFIGS["opt"]()
    config.max_position_embeddings = 40
    checkpoint = Checkpoint.open(make_model(config))
    comparison = Comparison(candidate=checkpoint, baseline=checkpoint, tokens=Tokens(token_ids(2, 32), "test"))
    for found in side_by_side.side_by_side(comparison) or ():
        assert (len(found["prompt"].split()), len(found["baseline"].split())) == (20, 20)
