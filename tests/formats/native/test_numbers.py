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
"""Numbers of levels and vectors: stored whichever way is smaller, read back, and told where they are damaged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.errors import CheckpointError
from hfcompress.formats.native.numbers import columns_of, packed, unpacked
from hfcompress.solvers.grid import codes_dtype


class Stored:
    """A tensor on disk."""

    def __init__(self, tensor):
        self.tensor, self.shape = tensor, tuple(tensor.shape)

    def read(self):
        return self.tensor


def numbers(rows: int, columns: int, bits: int, share: float = 1.0):
    """The lowest share of all numbers, at random."""
    generator = torch.Generator().manual_seed(rows * columns)
    most = max(1, int(share * 2**bits))
    return torch.randint(most, (rows, columns), generator=generator, dtype=codes_dtype(2**bits))


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 16), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_they_are_read_back(rows, columns, bits, share):
    found, table = numbers(rows, columns, bits, share), torch.rand(rows, 2**bits).half()
    stored = packed(found, bits, table)
    assert torch.equal(unpacked(stored, bits, rows, table), found)
    assert columns_of({local: Stored(tensor) for local, tensor in stored.items()}, rows) == columns
    assert sum(tensor.nbytes for tensor in stored.values()) <= 4 * rows * -(-columns * bits // 32) + 16


def test_what_is_not_even_is_coded_and_what_is_even_is_not():
    table = torch.rand(64, 16)
    assert "weight_shape" in packed(numbers(64, 256, 4), 4, table)
    uneven = numbers(64, 256, 4) * (torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) > 0.6)
    coded = packed(uneven, 4, table)
    assert "weight_classes" in coded
    assert sum(tensor.nbytes for tensor in coded.values()) < 0.75 * 64 * 256 / 2


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_damage_is_told(share):
    table = torch.rand(64, 256)
    stored = packed(numbers(64, 300, 8, share), 8, table)
    assert ("weight_classes" in stored) == (share < 1)
    changes = {"weight": lambda t: t[:-1] if t.dim() == 1 else t[:, :-1]}
    if share < 1:
        changes |= {"weight_classes": lambda t: t[:64], "weight_index": lambda t: t + 1}
        with pytest.raises(CheckpointError, match="damaged; download or copy"):
            unpacked(stored, 8, 64, table + 1)  # of another table
        with pytest.raises(CheckpointError, match="The numbers of a codebook are damaged; download or copy"):
            unpacked(stored, 4, 64, table)  # more than there are
    else:
        changes |= {"weight_shape": lambda t: t.new_tensor([64, 400])}
    for local, change in changes.items():
        with pytest.raises(CheckpointError, match="damaged; download or copy"):
            unpacked({**stored, local: change(stored[local])}, 8, 64, table)
