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
"""The integer grid and the rounded weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.solvers.grid import Grid, QuantizedWeight


@pytest.mark.parametrize(("bits", "least", "greatest"), [(2, -2, 1), (3, -4, 3), (4, -8, 7), (8, -128, 127)])
def test_codes_are_the_signed_integers_of_that_many_bits(bits, least, greatest):
    assert (Grid(bits).q_min, Grid(bits).q_max) == (least, greatest)


def test_columns_is_the_group_or_the_whole_row():
    assert Grid(4, 32).columns(96) == 32
    assert Grid(4, -1).columns(96) == 96


def test_round_takes_the_nearest_code_and_stays_on_the_grid():
    values = torch.tensor([-9.0, -1.1, -0.9, 0.0, 0.26, 0.74, 3.4, 99.0])
    codes = Grid(4).round(values, torch.tensor(0.5), None)
    assert codes.tolist() == [-8, -2, -2, 0, 1, 1, 7, 7]


def test_round_under_a_negative_scale_turns_the_signs():
    codes = Grid(3).round(torch.tensor([2.0, 1.0, -1.0, -2.0]), torch.tensor(-0.5), None)
    assert codes.tolist() == [-4, -2, 2, 3]


def test_round_moves_by_the_zero_point_before_it_clamps():
    codes = Grid(2, symmetric=False).round(
        torch.tensor([0.0, 1.0, 3.0, 5.0, -2.0]), torch.tensor(1.0), torch.tensor(-2.0)
    )
    assert codes.tolist() == [-2, -1, 1, 1, -2]


def test_round_leaves_its_arguments_alone():
    values, scales, zero_points = torch.tensor([[0.3, 2.0]]), torch.tensor([[0.5]]), torch.tensor([[1.0]])
    Grid(4, symmetric=False).round(values, scales, zero_points)
    assert values.tolist() == [[torch.tensor(0.3).item(), 2.0]]
    assert (scales.item(), zero_points.item()) == (0.5, 1.0)


def make_weight(bits=4, group_size=32, symmetric=False, dtype=torch.bfloat16, rows=5, columns=64):
    generator = torch.Generator().manual_seed(7)
    grid = Grid(bits, group_size, symmetric)
    groups = columns // grid.columns(columns)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (rows, columns), generator=generator).to(torch.int8)
    scales = torch.randn(rows, groups, generator=generator).to(dtype)
    zeros = torch.randint(grid.q_min, grid.q_max + 1, (rows, groups), generator=generator).to(torch.int8)
    return QuantizedWeight(codes, scales, None if symmetric else zeros, grid)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 8])
def test_dequantize_is_code_minus_zero_point_times_scale(bits, group_size, symmetric):
    weight = make_weight(bits, group_size, symmetric)
    values = weight.dequantize()
    assert values.dtype == torch.float32
    assert values.shape == (5, 64)
    columns = weight.grid.columns(64)
    for row in range(5):
        for column in range(64):
            zero_point = 0 if symmetric else weight.zero_points[row, column // columns].item()
            scale = weight.scales[row, column // columns].item()
            # 8 and 9 significant bits: the product is exact in float32
            assert values[row, column].item() == (weight.codes[row, column].item() - zero_point) * scale


def test_zero_points_far_from_the_codes_do_not_wrap_around():
    grid = Grid(8, -1, symmetric=False)
    codes, zero_points = torch.tensor([[-128, 127]], dtype=torch.int8), torch.tensor([[127]], dtype=torch.int8)
    values = QuantizedWeight(codes, torch.ones(1, 1), zero_points, grid).dequantize()
    assert values.tolist() == [[-255.0, 0.0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_is_the_part_that_belongs_to_those_rows(symmetric):
    weight = make_weight(symmetric=symmetric)
    part = weight.rows(1, 4)
    assert part.grid == weight.grid
    assert torch.equal(part.codes, weight.codes[1:4])
    assert torch.equal(part.scales, weight.scales[1:4])
    assert (part.zero_points is None) == symmetric
    assert torch.equal(part.dequantize(), weight.dequantize()[1:4])


# E4M3

E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3_VALUES = E4M3_VALUES[E4M3_VALUES.isfinite()].unique()


def nearest_e4m3(values):
    """The nearest value of the table, at a tie the one with an even mantissa; float64, by trying all."""
    distance = (values.double().clamp(-448, 448).unsqueeze(-1) - E4M3_VALUES).abs()
    near = distance == distance.amin(-1, keepdim=True)
    odd = (E4M3_VALUES.to(torch.float8_e4m3fn).view(torch.uint8) & 1).bool()
    return E4M3_VALUES[(near & ~(odd & (near.sum(-1, keepdim=True) > 1))).int().argmax(-1)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=20), st.sampled_from([1.0, 0.25, 2.0**-12]))
def test_float_codes_are_the_nearest_values_of_e4m3(values, scale):
    values = torch.tensor(values, dtype=torch.float32)
    codes = Grid(8, type="float").round(values * scale, torch.tensor(scale), None)
    assert codes.dtype == torch.float32
    assert torch.equal(codes.double(), nearest_e4m3(values * scale / scale))


def test_a_float_grid_ends_at_448_and_holds_its_codes_in_eight_bits():
    grid = Grid(8, type="float")
    assert (grid.q_min, grid.q_max, grid.dtype) == (-448, 448, torch.float8_e4m3fn)
    assert Grid(8).dtype == torch.int8
    assert grid.round(torch.tensor([1e6, -1e6, 464.0]), torch.tensor(1.0), None).tolist() == [448, -448, 448]


def test_float_codes_dequantize_to_code_times_scale():
    codes = torch.tensor([[1.125, -448.0, 0.0, 2.0**-9]]).to(torch.float8_e4m3fn)
    weight = QuantizedWeight(codes, torch.tensor([[0.5]]).bfloat16(), None, Grid(8, type="float"))
    assert weight.dequantize().tolist() == [[0.5625, -224.0, 0.0, 2.0**-10]]
    assert weight.rows(0, 1).dequantize().tolist() == weight.dequantize().tolist()
