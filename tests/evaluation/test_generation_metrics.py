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
"""Metrics of generated answers, against what comes out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.evaluation.generation_metrics import rougeL, token_f1, words


def test_what_is_compared():
    assert words("The Cat's  hat,\nan a.b!") == ["cats", "hat", "ab"]
    assert words("theatre another banana") == ["theatre", "another", "banana"]  # articles are whole words


@pytest.mark.parametrize(
    ("right", "predicted", "f1"),
    [
        ("The cat sat on the mat.", "a cat, sat on a hat", 0.75),  # cat sat on: 3 of 4 and 3 of 4
        ("no no yes", "no no no", 2 / 3),  # twice `no`: 2 of 3 and 2 of 3
        ("one two three four", "two", 0.4),  # precision 1, recall 1/4
        ("yes", "yes, yes, yes, yes", 0.4),  # precision 1/4, recall 1
        ("red blue", "blue red", 1),
        ("red", "blue", 0),
        ("red", "", 0),
        ("the", "a", 1),  # nothing is left of either
    ],
)
def test_token_f1_by_hand(right, predicted, f1):
    assert token_f1([right], [predicted]) == pytest.approx(f1)
    assert token_f1([predicted], [right]) == pytest.approx(f1)


@given(right=st.lists(st.sampled_from("xyz"), min_size=1), predicted=st.lists(st.sampled_from("xyz"), min_size=1))
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(right, predicted):
    shared = sum(min(right.count(word), predicted.count(word)) for word in "xyz")
    precision, recall = shared / len(predicted), shared / len(right)
    expected = 2 * precision * recall / (precision + recall) if shared else 0
    assert token_f1([" ".join(right)], [" ".join(predicted)]) == pytest.approx(expected)


def test_rouge_l_by_hand():
    """The longest common subsequence of `a b c d` and `a x c y z` is `a c`: 2 of 5 and 2 of 4."""
    pytest.importorskip("rouge_score")
    assert rougeL(["a b c d"], ["A, x c y z"]) == pytest.approx(2 * 0.4 * 0.5 / (0.4 + 0.5))
