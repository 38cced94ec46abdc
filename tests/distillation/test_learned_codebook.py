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
"""Levels and vectors that are trained: at first what was solved, gradients by definition, zeros that stay."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from hfcompress.distillation.learned_codebook import LearnedCodebook
from hfcompress.distillation.learned_factors import LearnedFactors
from hfcompress.solvers.grid import Grid, QuantizedWeight


def codebook(sparse: bool):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (6, 10), generator=generator, dtype=torch.uint8)
    levels = torch.randn(6, 4, generator=generator)
    if sparse:
        levels[:, 1] = 0
    return QuantizedWeight(codes, levels.half(), None, Grid(2, type="codebook"))


def vectors():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (6, 5, 2), generator=generator, dtype=torch.uint8)
    tables, scales = torch.randn(2, 4, 2, generator=generator), torch.rand(6, 1, generator=generator) + 0.5
    return QuantizedWeight(
        codes, scales.half(), None, Grid(0, 2, type="vector", rate=2.0, tables=2), vectors=tables.half()[None]
    )


def installed(linear, learned):
    parametrize.register_parametrization(linear, "weight", learned, unsafe=True)
    return learned


@pytest.mark.parametrize("start", [codebook(False), codebook(True), vectors()])
def test_it_begins_at_what_was_solved_and_gradients_are_sums(start):
    linear = nn.Linear(10, 6)
    learned = installed(linear, LearnedCodebook(start, torch.float32))
    assert torch.equal(linear.weight, start.dequantize())
    again = learned.quantized(linear.get_parameter("parametrizations.weight.original"))
    assert torch.equal(again.dequantize(), start.dequantize())
    pull = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    (linear.weight * pull).sum().backward()
    expected = torch.zeros_like(learned.table)
    for row in range(6):
        for column in range(10):
            if start.vectors is None:
                expected[row, int(start.codes[row, column])] += pull[row, column]
            else:
                place, within = divmod(column, 2)
                for table in range(2):
                    number = int(start.codes[row, place, table])
                    expected[0, table, number, within] += pull[row, column] * start.scales[row, 0].float()
    torch.testing.assert_close(learned.offset.grad, expected * learned.unit)


@pytest.mark.parametrize("start", [codebook(False), vectors()])
def test_what_is_in_use_is_what_is_stored(start):
    linear = nn.Linear(10, 6)
    learned = installed(linear, LearnedCodebook(start, torch.float32))
    with torch.no_grad():
        learned.offset.copy_(torch.randn(learned.offset.shape, generator=torch.Generator().manual_seed(2)))
    stored = learned.quantized(linear.get_parameter("parametrizations.weight.original"))
    assert (stored.scales if start.vectors is None else stored.vectors).dtype == torch.float16
    assert torch.equal(stored.dequantize(), linear.weight)
    assert not torch.equal(stored.dequantize(), start.dequantize())
    parametrize.remove_parametrizations(linear, "weight")
    assert torch.equal(stored.dequantize(), linear.weight)


def test_zeros_stay():
    start = codebook(True)
    linear = nn.Linear(10, 6)
    learned = installed(linear, LearnedCodebook(start, torch.float32, sparse=True))
    with torch.no_grad():
        learned.offset.fill_(0.3)
    assert torch.equal(linear.weight == 0, start.dequantize() == 0)
    assert not torch.equal(linear.weight, start.dequantize())


@pytest.mark.parametrize("base", [None, torch.ones(6, 10)])
def test_factors_learn_and_what_is_leant_on_stays(base):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(6, 3, generator=generator).bfloat16(), torch.randn(3, 10, generator=generator).bfloat16()
    start = QuantizedWeight(left, right, None, Grid(16, type="factors", rank=3), base=base)
    linear = nn.Linear(10, 6)
    learned = installed(linear, LearnedFactors(start, torch.float32))
    torch.testing.assert_close(linear.weight, start.dequantize())
    (linear.weight * torch.ones(6, 10)).sum().backward()
    unit = left.float().square().mean(0).sqrt()
    torch.testing.assert_close(learned.left.grad, right.float().sum(1).expand(6, 3) * unit)
    with torch.no_grad():
        learned.right.fill_(0.5)
    stored = learned.quantized(torch.empty(0))
    assert stored.scales.dtype == torch.bfloat16
    assert stored.base is base
    torch.testing.assert_close(stored.dequantize(), linear.weight)


def test_levels_of_groups_begin_where_they_were_solved_and_are_trained():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (6, 32), generator=generator, dtype=torch.uint8)
    levels = torch.randn(6, 2, 4, generator=generator).half()
    start = QuantizedWeight(codes, levels, None, Grid(2, 16, type="codebook"))
    linear = nn.Linear(32, 6)
    learned = installed(linear, LearnedCodebook(start, torch.float32))
    assert torch.equal(linear.weight, start.dequantize())
    linear.weight.square().sum().backward()
    with torch.no_grad():
        learned.offset -= 0.1 * learned.offset.grad.sign()
    now = learned.quantized(linear.weight)
    assert now.scales.shape == levels.shape
    assert torch.equal(now.dequantize(), linear.weight)
    assert linear.weight.square().sum() < start.dequantize().square().sum()
