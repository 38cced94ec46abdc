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
"""The scale search, against the full range and against a dense scan in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.solvers.grid import Grid
from hfcompress.solvers.scales import choose_scales


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weighted_error(weight, importance, scales, zero_points, grid):
    """`sum_j h_j (Q(w_j) - w_j)^2` for every row and group, in float64."""
    rows, groups = scales.shape
    values = weight.double().view(rows, groups, -1)
    scales = scales.double().unsqueeze(-1)
    zeros = 0 if zero_points is None else zero_points.double().unsqueeze(-1)
    codes = (torch.round(values / scales) + zeros).clamp(grid.q_min, grid.q_max)
    return (((codes - zeros) * scales - values).square() * importance.double().view(groups, -1)).sum(-1)


def make_problem(seed, rows=4, columns=64, spread=1.0):
    """Weights of different size per row, some of them large, and inputs of which some are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.exp(spread * torch.randn(rows, 1, generator=generator))
    weight[torch.rand(rows, columns, generator=generator) < 0.05] *= 5
    importance = torch.rand(columns, generator=generator) ** 4 * 10 + 1e-3
    return weight, importance


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 16, 32]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
)
def test_search_is_never_worse_than_the_full_range(seed, bits, group_size, symmetric, dtype, weighted):
    weight, importance = make_problem(seed)
    grid = Grid(bits, group_size, symmetric)
    given_importance = importance if weighted else None
    importance = importance if weighted else torch.ones_like(importance)
    searched = weighted_error(weight, importance, *choose_scales(weight, given_importance, grid, dtype), grid)
    plain = weighted_error(weight, importance, *choose_scales(weight, given_importance, grid, dtype, False), grid)
    assert (searched <= plain * (1 + 1e-4)).all()


def dense_scan(weight, importance, grid):
    """The least weighted error over 1500 shrinkages of each range that a grid can start from, in float64."""
    columns = grid.columns(weight.shape[1])
    groups = weight.double().view(len(weight), -1, columns)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    extreme = torch.where(high > -low, high, low)
    best = torch.full_like(low, float("inf"))
    for shrink in torch.linspace(0.4, 1.05, 1500, dtype=torch.float64):
        if grid.symmetric:
            candidates = [(shrink * extreme / grid.q_min, None), (shrink * extreme / grid.q_max, None)]
        else:
            scales = shrink * (high - low) / (2**grid.bits - 1)
            zero_points = torch.round(grid.q_min - shrink * low / scales).clamp(grid.q_min, grid.q_max)
            candidates = [(scales, zero_points)]
        for scales, zero_points in candidates:
            best = torch.minimum(best, weighted_error(weight, importance, scales, zero_points, grid))
    return best


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_comes_within_two_percent_of_a_dense_scan(bits, symmetric):
    weight, importance = make_problem(seed=3, rows=24, columns=64, spread=0.0)
    grid = Grid(bits, -1, symmetric)
    found = weighted_error(weight, importance, *choose_scales(weight, importance, grid, torch.float32), grid)
    best = dense_scan(weight, importance, grid)
    assert found.sum() <= 1.02 * best.sum()
    assert (found <= 1.5 * best).all()


def test_search_follows_the_importance():
    """A large weight on an input that is never there is clipped, so that the others get a finer step."""
    weight = torch.linspace(-0.5, 0.5, 32).unsqueeze(0)
    weight[0, 7] = 2.0
    grid = Grid(4)
    important = torch.ones(32)
    unimportant = important.clone()
    unimportant[7] = 0
    coarse, _ = choose_scales(weight, important, grid, torch.float32)
    fine, _ = choose_scales(weight, unimportant, grid, torch.float32)
    assert fine.abs().item() < 0.7 * coarse.abs().item()


@pytest.mark.parametrize("sign", [1, -1])
def test_search_refines_around_the_range_that_was_best(sign):
    """All codes of a step of 0.5, and an outlier without importance, whose range leads to that step between two
    coarse shrinkages and with the larger side on `q_max` only."""
    codes = torch.arange(-8, 8).float()
    weight = sign * 0.5 * torch.cat([codes, torch.tensor([7 / 0.808])]).unsqueeze(0)
    importance = torch.ones(17)
    importance[16] = 0
    scales, _ = choose_scales(weight, importance, Grid(4), torch.float32)
    assert scales.item() == pytest.approx(sign * 0.5, rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_full_range_puts_the_extreme_on_the_least_code(bits, sign):
    weight = sign * torch.tensor([[1.5, -1.0, 0.25, -0.5]])
    grid = Grid(bits)
    scales, zero_points = choose_scales(weight, None, grid, torch.float32, search=False)
    assert zero_points is None
    assert scales.item() == sign * 1.5 / grid.q_min  # negative where the extreme is positive
    codes = grid.round(weight, scales, None)
    assert codes[0, 0].item() == grid.q_min
    assert (codes[0, 0] * scales).item() == weight[0, 0].item()


def test_search_keeps_negative_scales_where_they_are_better():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(64, 32, generator=generator) * 0.7
    weight[:, 0] = 1.0
    scales, _ = choose_scales(weight, None, Grid(2), torch.float32)
    assert (scales < 0).all()
    scales, _ = choose_scales(-weight, None, Grid(2), torch.float32)
    assert (scales > 0).all()


def test_asymmetric_full_range_covers_least_and_greatest():
    weight = torch.tensor([[-0.5, 0.1, 1.0, 0.0], [0.25, 0.5, 1.0, 0.75], [-0.25, -0.5, -1.0, -0.75]])
    grid = Grid(4, symmetric=False)
    scales, zero_points = choose_scales(weight, None, grid, torch.float32, search=False)
    assert zero_points.dtype == torch.int8
    assert zero_points.flatten().tolist() == [-3, -8, 7]  # zero is always a value of the grid
    torch.testing.assert_close(scales.flatten(), torch.tensor([1.5, 1.0, 1.0]) / 15)
    values = (grid.round(weight, scales, zero_points.float()) - zero_points) * scales
    assert values[0].amin().item() == pytest.approx(-0.5)
    assert values[0].amax().item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_groups_get_a_finite_scale_and_stay_zero(symmetric, search, dtype):
    weight = torch.zeros(2, 64)
    weight[0, 32:] = torch.linspace(-1, 1, 32)
    grid = Grid(4, 32, symmetric)
    scales, zero_points = choose_scales(weight, None, grid, dtype, search)
    assert torch.isfinite(scales).all()
    assert (scales != 0).all()
    zeros = None if symmetric else zero_points.float().unsqueeze(-1)
    codes = grid.round(weight.view(2, 2, 32), scales.float().unsqueeze(-1), zeros)
    values = (codes - (0 if symmetric else zeros)) * scales.float().unsqueeze(-1)
    assert values[0, 0].abs().max() == 0
    assert values[1].abs().max() == 0
    assert values[0, 1].abs().max() > 0.5


def lattice(grid, seed=0, rows=8, columns=64):
    """Weights that lie on a grid whose full range they use, group by group, with steps that float16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    size = grid.columns(columns)
    groups = columns // size
    codes = torch.randint(grid.q_min, grid.q_max + 1, (rows, groups, size), generator=generator)
    codes[..., 3] = grid.q_min
    codes[..., 5] = grid.q_max
    steps = torch.exp2(torch.randint(-6, 3, (rows, groups, 1), generator=generator).float())
    zeros = 0
    if not grid.symmetric:
        zeros = torch.randint(grid.q_min, grid.q_max + 1, (rows, groups, 1), generator=generator)
    return ((codes - zeros) * steps).view(rows, columns), steps.squeeze(-1), zeros


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_that_lie_on_a_grid_are_found_again_exactly(bits, group_size, symmetric, dtype):
    grid = Grid(bits, group_size, symmetric)
    weight, steps, zeros = lattice(grid)
    scales, zero_points = choose_scales(weight, None, grid, dtype)
    importance = torch.ones(weight.shape[1])
    assert weighted_error(weight, importance, scales, zero_points, grid).abs().max() == 0
    assert torch.equal(scales.float(), steps)
    if not symmetric:
        assert torch.equal(zero_points.long(), zeros.squeeze(-1))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_grid_without_its_least_code_is_found_again_exactly(bits, sign):
    """What others call symmetric: codes from `-q_max` to `q_max`."""
    grid = Grid(bits)
    codes = torch.arange(-grid.q_max, grid.q_max + 1).float().unsqueeze(0)
    codes[0, 0 if sign == 1 else -1] = 0
    weight = codes * 0.375
    scales, _ = choose_scales(weight, None, grid, torch.float32)
    assert weighted_error(weight, torch.ones(weight.shape[1]), scales, None, grid).item() == 0


@settings(deadline=None, max_examples=30)
@given(exponent=st.integers(-40, 40), symmetric=st.booleans(), bits=st.sampled_from([2, 4, 8]))
def test_a_power_of_two_in_the_weights_is_one_in_the_scales(exponent, symmetric, bits):
    weight, importance = make_problem(seed=1)
    grid = Grid(bits, 32, symmetric)
    scales, zero_points = choose_scales(weight, importance, grid, torch.float32)
    scaled, same = choose_scales(weight * 2.0**exponent, importance, grid, torch.float32)
    assert torch.equal(scaled, scales * 2.0**exponent)
    assert symmetric or torch.equal(zero_points, same)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e25, 1e36])
def test_huge_and_small_weights_keep_their_relative_error(size, symmetric):
    """Also where squares underflow or overflow in float32."""
    weight, importance = make_problem(seed=2, spread=0.0)
    grid = Grid(4, 32, symmetric)
    ordinary = weighted_error(weight, importance, *choose_scales(weight, importance, grid, torch.float32, False), grid)
    scales, zero_points = choose_scales(weight * size, importance, grid, torch.float32)
    assert torch.isfinite(scales).all()
    error = weighted_error(weight.double() * size, importance, scales, zero_points, grid) / size**2
    assert (error <= 1.01 * ordinary).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_scales_that_underflow_their_dtype_give_zeros_instead_of_nan(search, symmetric):
    weight = torch.linspace(-1e-8, 1e-8, 32).unsqueeze(0)
    grid = Grid(4, -1, symmetric)
    scales, zero_points = choose_scales(weight, None, grid, torch.float16, search)
    assert scales.dtype == torch.float16
    assert (scales != 0).all()
    zeros = 0 if symmetric else zero_points.float()
    values = (grid.round(weight, scales.float(), None if symmetric else zeros) - zeros) * scales.float()
    assert torch.isfinite(values).all()
    assert values.abs().max() <= 1e-7


@pytest.mark.parametrize("symmetric", [True, False])
def test_float16_weights_as_large_as_can_be_keep_finite_scales(symmetric):
    weight = torch.tensor([[65504.0, -65504.0, 1.0, 30000.0]])
    for bits in (2, 4):
        grid = Grid(bits, -1, symmetric)
        scales, zero_points = choose_scales(weight, None, grid, torch.float16)
        assert torch.isfinite(scales.float()).all()
        error = weighted_error(weight, torch.ones(4), scales, zero_points, grid)
        assert error.item() < weight.double().square().sum().item()


def test_scales_are_rounded_to_their_dtype_before_they_are_tried():
    """What is returned is the best of candidates that bfloat16 can hold, not the best rounded afterwards."""
    weight, importance = make_problem(seed=5, rows=64, columns=32, spread=0.0)
    grid = Grid(4, -1, symmetric=False)
    stored = weighted_error(weight, importance, *choose_scales(weight, importance, grid, torch.bfloat16), grid)
    scales, zero_points = choose_scales(weight, importance, grid, torch.float32)
    afterwards = weighted_error(weight, importance, scales.bfloat16(), zero_points, grid)
    assert stored.sum() < afterwards.sum()


def test_groups_do_not_see_each_other():
    weight, importance = make_problem(seed=6)
    grid = Grid(4, 16, symmetric=False)
    scales, zero_points = choose_scales(weight, importance, grid, torch.float32)
    for group in range(4):
        columns = slice(16 * group, 16 * (group + 1))
        alone = choose_scales(
            weight[:, columns].contiguous(), importance[columns], Grid(4, -1, symmetric=False), torch.float32
        )
        assert torch.equal(scales[:, group], alone[0][:, 0])
        assert torch.equal(zero_points[:, group], alone[1][:, 0])


def test_many_rows_in_chunks_give_what_they_give_alone(monkeypatch):
    weight, importance = make_problem(seed=7, rows=10)
    grid = Grid(3, 32, symmetric=False)
    whole = choose_scales(weight, importance, grid, torch.float32)
    monkeypatch.setattr("hfcompress.solvers.scales.VALUES_AT_ONCE", 3 * 64)
    chunked = choose_scales(weight, importance, grid, torch.float32)
    assert torch.equal(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])
