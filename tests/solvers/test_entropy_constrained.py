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
"""Vectors chosen by what their numbers take: the bits that are asked for, and less lost than by steps at the same."""

from functools import partial

import pytest
import torch

from hfcompress.formats.native.vectors import VectorCodes
from hfcompress.solvers.coded import gptq_coded, sweep_coded
from hfcompress.solvers.curvature import indifferent
from hfcompress.solvers.entropy_constrained import CLOSE, code_lengths, constrained, rate
from hfcompress.solvers.gptq import factorize
from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.objective import Objective
from hfcompress.solvers.vectors import Vectors, gptq_vectors


def problem(rows: int = 384, columns: int = 256):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = normal(1000, 30) @ normal(30, columns) * 0.3 + normal(1000, columns)
    return normal(rows, columns) * (0.5 * normal(rows, 1)).exp(), inputs.T @ inputs / 1000


@pytest.mark.parametrize(
    ("bits", "length", "entries"), [(1.0, 1, 32), (1.5, 1, 32), (2.2, 1, 32), (1.0, 4, 256), (2.0, 2, 256)]
)
def test_the_file_takes_what_was_asked_for(bits, length, entries):
    weight, gram = problem()
    found = gptq_vectors(
        weight,
        gram,
        factorize(gram, act_order=False),
        length,
        torch.float16,
        3,
        entries=entries,
        improve=partial(constrained, bits=bits),
    )
    assert rate(found) == pytest.approx(bits, rel=3 * CLOSE)
    grid = Grid(0, length, type="vector", rate=(entries.bit_length() - 1) / length, limit=bits)
    stored = VectorCodes().pack(
        QuantizedWeight(found.codes, found.scales[:, None].half(), None, grid, vectors=found.vectors.half())
    )
    assert 8 * sum(tensor.nbytes for tensor in stored.values()) / weight.numel() == pytest.approx(bits, rel=0.03)
    assert torch.equal(VectorCodes().unpack(stored, grid).dequantize(), found.values())


def test_about_one_bit_levels_lose_less_than_steps():
    weight, gram = problem()
    factor, rows = factorize(gram), indifferent(len(weight))
    grid = Grid(8, type="coded", rate=1.0)
    steps = gptq_coded(
        weight, factor, rows, grid, lambda scales, columns: sweep_coded(weight, factor, rows, scales, columns, grid)
    )
    levels = gptq_vectors(
        weight,
        gram,
        factorize(gram, act_order=False),
        1,
        torch.float16,
        3,
        entries=32,
        improve=partial(constrained, bits=1.0),
    )
    objective = Objective.of(weight, gram, factorize(gram, act_order=False))
    assert objective.loss(levels.values()) < 0.9 * objective.loss(steps.dequantize())


def test_a_number_takes_what_its_share_is_worth():
    codes = torch.tensor([0] * 8 + [1] * 4 + [2] * 2 + [3] * 2, dtype=torch.uint8).view(4, 4, 1).repeat(1, 100, 1)
    found = Vectors(codes, torch.ones(4), torch.randn(1, 1, 5, 2), torch.zeros(4, dtype=torch.int64))
    [lengths] = code_lengths(found)
    torch.testing.assert_close(lengths[0, :4], torch.tensor([1.0, 2.0, 3.0, 3.0]), rtol=0, atol=1e-3)
    assert lengths[0, 4] > 10
