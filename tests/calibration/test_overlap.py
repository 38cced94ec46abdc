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
"""Text that was calibrated on is found in the evaluation, wherever it lies there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.calibration.overlap import SKETCH, WINDOW, overlap, sketch
from hfcompress.calibration.tokens import Tokens


def rows(array) -> Tokens:
    return Tokens(np.asarray(array, dtype=np.int64), "test")


def windows(tokens: Tokens) -> list[bytes]:
    width = min(WINDOW, tokens.input_ids.shape[1])
    return [row[start : start + width].tobytes() for row in tokens.input_ids for start in range(len(row) - width + 1)]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), copied=st.integers(0, 3), shift=st.integers(0, 40))
def test_a_small_text_is_matched_exactly(seed, copied, shift):
    rng = np.random.default_rng(seed)
    calibration = rows(rng.integers(0, 500, (4, 100)))
    text = rng.integers(0, 500, (4, 120))
    text[:copied, shift : shift + 60] = calibration.input_ids[:copied, 20:80]
    evaluation = rows(text)
    known = set(windows(calibration))
    expected = np.mean([window in known for window in windows(evaluation)])
    assert overlap(evaluation, sketch(calibration)) == pytest.approx(expected)
    assert (expected > 0) == (copied > 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_large_text_is_estimated(share):
    rng = np.random.default_rng(0)
    calibration = rows(rng.integers(0, 5000, (64, 512)))
    text = rng.integers(0, 5000, (64, 512))
    text[: int(64 * share)] = calibration.input_ids[: int(64 * share)]
    known = sketch(calibration)
    assert len(known) == SKETCH
    assert overlap(rows(text), known) == pytest.approx(int(64 * share) / 64, abs=0.08)


def test_padding_is_no_text():
    calibration = rows(np.zeros((2, 64)))
    mask = np.ones((2, 64), dtype=bool)
    mask[:, :40] = False
    padded = Tokens(np.where(mask, np.arange(128).reshape(2, 64) + 1, 0), "test", mask)
    assert overlap(padded, sketch(calibration)) == 0
