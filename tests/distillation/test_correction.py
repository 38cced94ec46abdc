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
"""Low-rank corrections: the best of their rank, and merged under a mask as they answered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.distillation.correction import Correction, error_correcting, starting


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(2, 9), columns=st.integers(2, 9), seed=st.integers(0, 50), data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_product_of_its_rank_is_nearer(rows, columns, seed, data):
    """Against the truncated singular value decomposition of `error gram^(1/2)`, whose tail is the least that can remain."""
    rank = data.draw(st.integers(1, min(rows, columns)))
    error, inputs = normal(rows, columns, seed=seed), normal(4 * columns, columns, seed=seed + 1)
    down, up = error_correcting(error, inputs.T @ inputs, rank)
    assert (down.shape, up.shape) == ((rank, columns), (rows, rank))
    left = (inputs @ (error - up.double() @ down.double()).T).norm()
    least = torch.linalg.svdvals(inputs @ error.T)[rank:].norm()
    whole = (inputs @ error.T).norm()
    assert left.item() == pytest.approx(least.item(), abs=1e-5 * whole.item())


def test_both_parts_are_of_like_sizes():
    down, up = error_correcting(normal(6, 8) * 100, torch.eye(8), 3)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))


def test_it_begins_at_nothing():
    assert not Correction(*starting((5, 7), 2, torch.Generator().manual_seed(0))).weight().any()


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_beside_a_linear_is_in_it(transposed, masked):
    linear = (Conv1D(6, 8) if transposed else nn.Linear(8, 6)).double()
    keep = normal(6, 8, seed=3) > 0 if masked else None
    correction = Correction(normal(2, 8, seed=1), normal(6, 2, seed=2), keep).double()
    x = normal(4, 5, 8, seed=4)
    handle = correction.beside(linear)
    found = linear(x)
    handle.remove()
    with torch.no_grad():
        change = correction.weight()
        assert keep is None or not change[~keep].any()
        linear.weight += change.T if transposed else change
    torch.testing.assert_close(linear(x), found)
