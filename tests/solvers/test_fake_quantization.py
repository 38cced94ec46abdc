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
"""Fake quantization: it starts at the solver's codes exactly, and its gradients are those of the slow reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.distillation.fake_quantized import fake_quantize_linear
from hfcompress.solvers.fake_quantization import MARGIN, fake_quantize, positions, round_to_codes
from hfcompress.solvers.grid import Grid, QuantizedWeight


def rounded(bits: int, symmetric: bool, seed: int, scale: float = 0.02) -> tuple[torch.Tensor, QuantizedWeight]:
    """A weight, and codes that lie near it or far from it, on scales of either sign."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, 4, symmetric)
    weight = torch.randn(3, 8, generator=generator) * scale * 2 ** (bits - 1)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (3, 8), generator=generator).to(torch.int8)
    scales = (scale * (0.5 + torch.rand(3, 2, generator=generator))).bfloat16()
    scales[0] *= -1
    zero_points = None
    if not symmetric:
        zero_points = torch.randint(grid.q_min, grid.q_max + 1, (3, 2), generator=generator).to(torch.int8)
    return weight, QuantizedWeight(codes, scales, zero_points, grid)


CASES = {"bits": st.sampled_from([2, 3, 4, 8]), "symmetric": st.booleans(), "seed": st.integers(0, 999)}


@settings(max_examples=60, deadline=None)
@given(**CASES, scale=st.sampled_from([1e-6, 0.02, 30.0]))
def test_the_start_is_exactly_the_solvers(bits, symmetric, seed, scale):
    weight, start = rounded(bits, symmetric, seed, scale)
    scales = start.scales.float()
    position = positions(weight, start)
    assert torch.equal(round_to_codes(position, scales, scales, start.zero_points, start.grid), start.codes.float())
    values = fake_quantize(position, scales, scales, start.zero_points, start.grid)
    assert torch.equal(values, start.dequantize())


def test_a_weight_in_the_cell_of_its_code_stays_where_it_is():
    weight = torch.tensor([[0.029, 0.011, -0.049, 0.0501]])
    start = QuantizedWeight(torch.tensor([[1, 1, -2, 2]], dtype=torch.int8), torch.tensor([[0.02]]), None, Grid(4))
    expected = torch.tensor([[1.45, 0.55, -2.45, 2.45]])
    assert torch.allclose(positions(weight, start), expected)
    assert torch.equal(positions(weight, start, margin=0.5), start.codes.float())


def reference(position, start_scales, scales, zero_points, grid, upstream):
    """Value and gradients, number by number, in float64."""
    rows, columns = position.shape
    per = columns // scales.shape[1]
    value, to_position = torch.zeros(rows, columns).double(), torch.zeros(rows, columns).double()
    to_scales = torch.zeros(scales.shape).double()
    for row in range(rows):
        for column in range(columns):
            group = column // per
            zero = 0 if zero_points is None else zero_points[row, group].item()
            low, high = grid.q_min - zero, grid.q_max - zero
            scale = scales[row, group].item()
            moved = position[row, column].item() * start_scales[row, group].item() / scale
            code = min(max(round(moved), low), high)
            value[row, column] = code * scale
            inside = low - 0.5 <= moved <= high + 0.5
            to_position[row, column] = upstream[row, column].item() * start_scales[row, group].item() * inside
            step = (code - moved) if inside else code
            to_scales[row, group] += upstream[row, column].item() * step / math.sqrt(per * grid.q_max)
    return value, to_position, to_scales


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_values_and_gradients_are_the_references(bits, symmetric, seed):
    weight, start = rounded(bits, symmetric, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    start_scales = start.scales.float()
    position = (positions(weight, start) + torch.randn(3, 8, generator=generator)).requires_grad_()
    scales = (start_scales * (0.7 + 0.6 * torch.rand(3, 2, generator=generator))).requires_grad_()
    upstream = torch.randn(3, 8, generator=generator)
    values = fake_quantize(position, start_scales, scales, start.zero_points, start.grid)
    values.backward(upstream)
    value, to_position, to_scales = reference(
        position.detach(), start_scales, scales.detach(), start.zero_points, start.grid, upstream
    )
    assert torch.allclose(values.double(), value, rtol=1e-5, atol=1e-7)
    assert torch.allclose(position.grad.double(), to_position, rtol=1e-5, atol=1e-7)
    assert torch.allclose(scales.grad.double(), to_scales, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("train", ["weights", "scales", "both"])
def test_a_linear_learns_what_it_may_and_stores_what_it_computes_with(train):
    weight, start = rounded(3, True, 5)
    linear = torch.nn.Linear(8, 3, bias=False)
    linear.weight.data = weight.clone()
    learning = fake_quantize_linear(linear, start, torch.float32, train)
    assert torch.equal(linear.weight, start.dequantize())
    position = linear.parametrizations.weight.original
    before = position.detach().clone(), learning.ratio.detach().clone()
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([p for p in (position, learning.ratio) if p.requires_grad], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (linear(inputs) - inputs @ weight.T).square().mean().backward()
        optimizer.step()
    assert torch.equal(position, before[0]) == (train == "scales")
    assert torch.equal(learning.ratio, before[1]) == (train == "weights")
    stored = learning.quantized(position)
    assert torch.equal(stored.dequantize(), linear.weight)
    assert stored.scales.dtype == start.scales.dtype
    assert stored.codes.amin() >= start.grid.q_min
    assert stored.codes.amax() <= start.grid.q_max
    error = [(v @ inputs.T - weight @ inputs.T).square().mean() for v in (stored.dequantize(), start.dequantize())]
    assert error[0] < error[1]


def test_the_margin_is_kept():
    weight, start = rounded(4, False, 3)
    away = positions(weight, start) - (start.codes.float() - start.zero_points.repeat_interleave(4, 1).float())
    assert away.abs().max() <= 0.5 - MARGIN + 1e-5
