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
"""What the measurements on text share: rows without padding, their starts, and statistics by position."""

import dataclasses

import numpy as np
import pytest
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MambaConfig

from hfcompress.calibration.tokens import DEFAULT_CONTEXT, Tokens
from hfcompress.evaluation.quality import Divergence
from hfcompress.evaluation.rows import by_position, context_length, starts
from hfcompress.models.checkpoint import Checkpoint


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), wanted=st.integers(1, 15), left=st.booleans())
def test_prompts_are_the_starts_of_rows_without_padding(lengths, wanted, left):
    ids = np.arange(12 * len(lengths)).reshape(len(lengths), 12)
    where = np.arange(12)[::-1] if left else np.arange(12)
    mask = where[None] < np.array(lengths)[:, None]
    found = starts(Tokens(ids, "counted", mask), wanted, 0)
    width = min(wanted, max(lengths))
    expected = [row[m][:width].tolist() for row, m in zip(ids, mask, strict=True) if m.sum() >= width]
    assert sorted(found.tolist()) == sorted(expected)


@settings(deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(2, 40),
    cuts=st.sets(st.integers(2, 39), max_size=5),
    seed=st.integers(0, 9),
)
def test_buckets_cover_every_position_once(rows, length, cuts, seed):
    edges = sorted({1, length, *(c for c in cuts if c < length)})
    position = np.tile(np.arange(1, length), rows)
    kl = np.random.default_rng(seed).random(len(position))
    blank = {field.name: kl for field in dataclasses.fields(Divergence) if field.name != "teacher"}
    row = np.repeat(np.arange(rows), length - 1)
    buckets = by_position(Divergence(**{**blank, "kl": kl, "row": row, "position": position}), edges)
    assert [b["from"] for b in buckets] == edges[:-1]
    assert [b["to"] for b in buckets] == edges[1:]
    assert sum(b["kl_mean"] * (b["to"] - b["from"]) * rows for b in buckets) == pytest.approx(kl.sum())


def test_a_model_that_names_no_context(llama):
    assert context_length(Checkpoint.open(llama)) == 64
    endless = make_model(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, state_size=4))
    assert context_length(Checkpoint.open(endless)) == DEFAULT_CONTEXT
