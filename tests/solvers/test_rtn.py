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
"""Round to nearest, against trying every code."""

import pytest
import torch

from hfcompress.solvers.grid import Grid
from hfcompress.solvers.rtn import rtn
from hfcompress.solvers.scales import choose_scales


def make_weight(rows=6, columns=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def distance_to_the_nearest_value(weight, quantized):
    """For every weight the distance to the nearest value of its group's grid, by trying all of them, in float64."""
    grid = quantized.grid
    groups = weight.double().view(len(weight), quantized.scales.shape[1], -1, 1)
    codes = torch.arange(grid.q_min, grid.q_max + 1, dtype=torch.float64)
    zeros = 0 if quantized.zero_points is None else quantized.zero_points.double()[..., None, None]
    values = (codes - zeros) * quantized.scales.double()[..., None, None]
    return (groups - values).abs().amin(-1).view(weight.shape)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_weight_goes_to_the_nearest_value_of_its_grid(bits, group_size, symmetric, search):
    weight = make_weight()
    quantized = rtn(weight, Grid(bits, group_size, symmetric), torch.float32, search)
    assert quantized.codes.dtype == torch.int8
    assert quantized.codes.min() >= quantized.grid.q_min
    assert quantized.codes.max() <= quantized.grid.q_max
    off = (weight.double() - quantized.dequantize().double()).abs()
    torch.testing.assert_close(off, distance_to_the_nearest_value(weight, quantized), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_the_chosen_ones_in_the_stored_dtype(symmetric, dtype):
    weight, grid = make_weight(), Grid(4, 32, symmetric)
    quantized = rtn(weight, grid, dtype)
    scales, zero_points = choose_scales(weight, None, grid, dtype)
    assert quantized.scales.dtype == dtype
    assert torch.equal(quantized.scales, scales)
    if symmetric:
        assert quantized.zero_points is None
    else:
        assert quantized.zero_points.dtype == torch.int8
        assert torch.equal(quantized.zero_points, zero_points)


def test_search_loses_less_than_the_full_range():
    weight = make_weight(rows=32)
    for symmetric in (True, False):
        grid = Grid(3, 32, symmetric)
        searched, plain = (rtn(weight, grid, torch.bfloat16, search).dequantize() for search in (True, False))
        assert (weight - searched).square().sum() < 0.9 * (weight - plain).square().sum()


def test_eight_bits_are_within_half_a_step():
    weight = make_weight()
    quantized = rtn(weight, Grid(8, 32, symmetric=False), torch.float32, search=False)
    # the zero point is rounded too, so that one end of the range may be clipped by half a step
    half = quantized.scales.repeat_interleave(32, 1) / 2
    assert ((weight - quantized.dequantize()).abs() <= half * 1.0001).float().mean() > 0.99
    assert ((weight - quantized.dequantize()).abs() <= 2 * half * 1.0001).all()


def test_all_zero_weights_stay_zero():
    for symmetric in (True, False):
        quantized = rtn(torch.zeros(3, 32), Grid(4, 32, symmetric), torch.bfloat16)
        assert torch.equal(quantized.dequantize(), torch.zeros(3, 32))


def test_the_weight_is_left_alone():
    weight = make_weight()
    before = weight.clone()
    rtn(weight, Grid(4, 32, symmetric=False), torch.bfloat16)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("search", [True, False])
def test_float_weights_go_to_the_nearest_value_of_e4m3(search, dtype):
    weight = make_weight() * torch.logspace(-3, 1, 6).unsqueeze(1)
    quantized = rtn(weight, Grid(8, type="float"), dtype, search)
    assert quantized.codes.dtype == torch.float8_e4m3fn
    assert quantized.zero_points is None
    assert (quantized.scales > 0).all()
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[values.isfinite()] * quantized.scales.double()
    nearest = (weight.double().unsqueeze(-1) - values.unsqueeze(1)).abs().amin(-1)
    off = (weight.double() - quantized.dequantize().double()).abs()
    assert (off <= nearest + 1e-6 * weight.double().abs()).all()


def test_searched_float_scales_lose_less_than_the_full_range():
    weight = make_weight(rows=32, columns=128)
    grid = Grid(8, type="float")
    searched, plain = (rtn(weight, grid, torch.float32, search).dequantize() for search in (True, False))
    assert (weight - searched).square().sum() < 0.97 * (weight - plain).square().sum()
