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

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.errors import InvalidValueError
from hfcompress.solvers.pattern import Pattern
from hfcompress.solvers.saliency import saliency


def scores_of(seed, rows, columns):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.01


@given(st.integers(0, 999), st.integers(2, 8), st.data())
def test_of_every_group_the_best_stay(seed, size, data):
    kept = data.draw(st.integers(1, size - 1))
    pattern = Pattern.parse(f"{kept}:{size}")
    scores = scores_of(seed, 3, 4 * size)
    mask = pattern.mask(scores)
    assert (mask.view(3, 4, size).sum(-1) == kept).all()
    for row in range(3):
        for group in range(4):
            own = slice(group * size, (group + 1) * size)
            stays, goes = scores[row, own][mask[row, own]], scores[row, own][~mask[row, own]]
            assert stays.min() >= goes.max()
    assert pattern.holds(scores * mask)
    assert not pattern.holds(scores)
    assert pattern.sparsity == pytest.approx(1 - kept / size)


@given(st.integers(0, 999), st.floats(0.1, 0.9))
def test_anywhere_means_the_whole_matrix_or_every_row(seed, sparsity):
    pattern, scores = Pattern.parse("unstructured", sparsity), scores_of(seed, 6, 40)
    mask = pattern.mask(scores)
    assert mask.sum() == 240 - round(240 * sparsity)
    assert scores[mask].min() >= scores[~mask].max()
    assert pattern.holds(scores * mask)
    assert (pattern.mask(scores, by_row=True).sum(1) == 40 - round(40 * sparsity)).all()


def test_blocks_stay_or_go_whole():
    pattern, scores = Pattern.parse("2x4", 0.5), scores_of(1, 6, 16)
    mask = pattern.mask(scores).view(3, 2, 4, 4)
    whole = mask.all(3).all(1)
    assert torch.equal(whole, mask.any(3).any(1))
    assert whole.sum() == 6
    sums = scores.view(3, 2, 4, 4).sum((1, 3))
    assert sums[whole].min() >= sums[~whole].max()
    assert pattern.holds(scores * mask.view(6, 16))
    assert not pattern.holds(scores)


@pytest.mark.parametrize("text", ["2/4", "4:2", "4:4", "0:4", "half", "1:64", "0x4", ""])
def test_what_is_no_pattern_is_told(text):
    with pytest.raises(InvalidValueError, match=r"is no sparsity pattern; write N:M.*2:4.*unstructured.*RxC"):
        Pattern.parse(text)


def test_what_fits():
    assert Pattern.parse("2:4").fits(3, 8)
    assert not Pattern.parse("2:4").fits(3, 6)
    assert Pattern.parse("16x1").fits(32, 7)
    assert not Pattern.parse("16x1").fits(24, 7)
    assert Pattern.parse("unstructured").fits(5, 7)


def test_criteria_by_hand():
    weight = torch.tensor([[3.0, -1.0], [-1.0, 1.0]])
    gram = torch.tensor([[4.0, 1.0], [1.0, 9.0]])
    curvature = [torch.tensor([[2.0]]), torch.tensor([[5.0]])]
    assert saliency("magnitude", weight, None).tolist() == [[3, 1], [1, 1]]
    assert saliency("wanda", weight, gram).tolist() == [[6, 3], [2, 3]]
    assert saliency("taylor", weight, gram, curvature).tolist() == [[72, 18], [20, 45]]
    expected = [
        [(3 / 4 + 3 / 4) * 2**0.5, (1 / 2 + 1 / 4) * 3**0.5],
        [(1 / 4 + 1 / 2) * 2**0.5, (1 / 2 + 1 / 2) * 3**0.5],
    ]
    assert torch.allclose(saliency("ria", weight, gram), torch.tensor(expected))
    first, again, other = (saliency("random", weight, None, seed=s) for s in ("0 q", "0 q", "0 k"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
