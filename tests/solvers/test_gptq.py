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
"""GPTQ: against the textbook recursion in float64, and against trying every combination of codes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.solvers.gptq import HEADROOM, NotPositiveDefiniteError, factorize, gptq
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.rtn import rtn
from hfcompress.solvers.scales import choose_scales


UNDECIDED = 2e-4  # this close to a tie, float32 may round to the other side


def make_problem(seed=0, rows=6, columns=192, tokens=None):
    """A weight and the Gram matrix of correlated inputs, some of which are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    tokens = tokens or 4 * columns
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.exp(0.7 * torch.randn(columns, generator=generator))
    inputs = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + mixing) * sizes
    gram = inputs.T @ inputs / tokens
    return weight, (gram + gram.T) / 2


def damp(gram, damping):
    """The Gram matrix as GPTQ sees it: dead columns get a diagonal, and every diagonal a share of the mean."""
    damped = gram.double().clone()
    mean = damped.diagonal().mean().item() or 1.0
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    return damped


def textbook_gptq(weight, damped, order, scales, zero_points, grid):
    """
    Algorithm 1 of the paper, column by column in float64: round, divide the error by the diagonal of the Cholesky
    factor of the inverse, and take it off the columns that remain.

    Returns:
        codes in the order of the columns, and for every row how close to a tie its closest call was.
    """
    columns = weight.shape[1]
    groups = torch.arange(columns) // grid.columns(columns)
    scales = scales.double()[:, groups]
    zeros = torch.zeros_like(scales) if zero_points is None else zero_points.double()[:, groups]
    left = weight.double()[:, order].clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    codes = torch.empty_like(left)
    closest = torch.full((len(weight),), float("inf"), dtype=torch.float64)
    for step, column in enumerate(order.tolist()):
        scaled = left[:, step] / scales[:, column]
        code = (torch.round(scaled) + zeros[:, column]).clamp(grid.q_min, grid.q_max)
        inside = (scaled + zeros[:, column] - (grid.q_min + grid.q_max) / 2).abs() < 2 ** (grid.bits - 1)
        tie = (scaled - scaled.floor() - 0.5).abs()
        closest = torch.where(inside, torch.minimum(closest, tie), closest)
        value = (code - zeros[:, column]) * scales[:, column]
        error = (left[:, step] - value) / upper[step, step]
        left[:, step + 1 :] -= error[:, None] * upper[step, step + 1 :]
        codes[:, column] = code
    return codes.to(torch.int8), closest


def assert_as_in_the_textbook(weight, gram, grid, dtype, search, act_order, damping=0.01):
    factor = factorize(gram, damping, act_order)
    quantized = gptq(weight, factor, grid, dtype, search)
    headroom = 1 + HEADROOM / grid.bits if search else 1.0
    scales, zero_points = choose_scales(weight, factor.importance, grid, dtype, search, headroom)
    assert torch.equal(quantized.scales, scales)
    assert (quantized.zero_points is None) if zero_points is None else torch.equal(quantized.zero_points, zero_points)
    order = torch.arange(len(gram))
    if act_order:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    expected, closest = textbook_gptq(weight, damp(gram, damping), order, scales, zero_points, grid)
    decided = closest > UNDECIDED
    assert torch.equal(quantized.codes[decided], expected[decided])
    return decided


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_textbook(bits, group_size, symmetric, act_order):
    """192 columns: one block of 128 and half of another, six sub-blocks."""
    weight, gram = make_problem(seed=bits)
    for search in (True, False):
        decided = assert_as_in_the_textbook(
            weight, gram, Grid(bits, group_size, symmetric), torch.float32, search, act_order
        )
        assert decided.float().mean() >= 0.5


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    columns=st.sampled_from([1, 2, 31, 32, 33, 64, 65, 127, 128, 129, 160, 161]),
    bits=st.sampled_from([2, 3, 4]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
)
def test_codes_are_those_of_the_textbook_at_any_width(seed, rows, columns, bits, symmetric, act_order):
    weight, gram = make_problem(seed, rows, columns, tokens=4 * columns + 8)
    assert_as_in_the_textbook(weight, gram, Grid(bits, -1, symmetric), torch.float32, False, act_order)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_scales_as_they_are_stored(dtype, symmetric):
    weight, gram = make_problem(seed=11, rows=16, columns=96)
    grid = Grid(4, 32, symmetric)
    for search in (True, False):
        assert gptq(weight, factorize(gram), grid, dtype, search).scales.dtype == dtype
        decided = assert_as_in_the_textbook(weight, gram, grid, dtype, search, act_order=True)
        assert decided.sum() >= 8


def test_scales_that_are_rounded_only_afterwards_would_give_other_codes():
    """So that the test above can fail: the textbook on unrounded scales disagrees with codes solved for bfloat16."""
    weight, gram = make_problem(seed=11, rows=16, columns=96)
    grid = Grid(4, 32)
    quantized = gptq(weight, factorize(gram), grid, torch.bfloat16, search=False)
    unrounded, _ = choose_scales(weight, None, grid, torch.float32, search=False)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    codes, _ = textbook_gptq(weight, damp(gram, 0.01), order, unrounded, None, grid)
    assert (codes != quantized.codes).float().mean() > 0.01


def objective(weight, values, gram):
    """`tr((W - Q) H (W - Q)^T)`, row by row, in float64."""
    difference = weight.double() - values.double()
    return ((difference @ gram.double()) * difference).sum(-1)


def least_objective(weight, gram, scales, zero_points, grid):
    """The least objective of every row, over all combinations of codes."""
    codes = range(grid.q_min, grid.q_max + 1)
    combinations = torch.tensor(list(itertools.product(codes, repeat=weight.shape[1])), dtype=torch.float64)
    best = []
    for row in range(len(weight)):
        zero_point = 0 if zero_points is None else zero_points[row].double()
        values = (combinations - zero_point) * scales[row].double()
        best.append(objective(weight[row].expand_as(values), values, gram).min())
    return torch.stack(best)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_objective_lies_between_the_optimum_and_rounding_to_nearest(symmetric, act_order, search):
    """In the geometric mean: where feedback pushes a value off so small a grid, a single row may lose to rounding."""
    over_optimum, nearest_over_optimum = [], []
    for seed in range(24):
        weight, gram = make_problem(100 + seed, rows=2, columns=4 + seed % 3, tokens=40)
        grid = Grid(2, -1, symmetric)
        quantized = gptq(weight, factorize(gram, 0.0, act_order), grid, torch.float32, search)
        zeros = None if symmetric else quantized.zero_points.float()
        nearest = (grid.round(weight, quantized.scales, zeros) - (0 if symmetric else zeros)) * quantized.scales
        optimum = least_objective(weight, gram, quantized.scales, quantized.zero_points, grid)
        over_optimum.append(objective(weight, quantized.dequantize(), gram) / optimum)
        nearest_over_optimum.append(objective(weight, nearest, gram) / optimum)
    found, nearest = torch.cat(over_optimum), torch.cat(nearest_over_optimum)
    assert found.min() >= 1 - 1e-4  # values are float32
    assert (found <= nearest * (1 + 1e-6)).float().mean() > 0.7
    assert (found <= 1 + 1e-6).float().mean() > 0.4  # often it is the optimum
    assert found.log().mean() < nearest.log().mean()
    assert found.log().mean().exp() < 1.4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_objective_of_many_columns_is_far_below_that_of_rounding_to_nearest(bits):
    weight, gram = make_problem(seed=20, rows=16, columns=96)
    quantized = gptq(weight, factorize(gram), Grid(bits, 32), torch.float32)
    nearest = rtn(weight, Grid(bits, 32), torch.float32)
    lost, plain = (objective(weight, q.dequantize(), gram).sum() for q in (quantized, nearest))
    assert lost < 0.6 * plain


def test_two_columns_by_hand():
    """The second column takes up what the first one lost: `w_2 + e_1 H_12 / H_22`."""
    gram = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.tensor([[0.4, 0.3, -8.0]])  # the third column, alone with itself, sets the scale to one
    factor = factorize(gram, 0.0, act_order=False)
    torch.testing.assert_close(factor.feedback, torch.tensor([[0.0, 0.8, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    codes = gptq(weight, factor, Grid(4), torch.float32, search=False).codes
    assert codes.tolist() == [[0, 1, -8]]  # 0.3 + 0.8 * 0.4 = 0.62
    assert rtn(weight, Grid(4), torch.float32, search=False).codes.tolist() == [[0, 0, -8]]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_are_not_correlated_leave_nothing_to_feed_back(symmetric, act_order):
    weight, gram = make_problem(seed=3, columns=160)
    grid = Grid(3, 32, symmetric)
    diagonal = gram.diagonal().diag()
    quantized = gptq(weight, factorize(diagonal, 0.01, act_order), grid, torch.float32, search=False)
    nearest = rtn(weight, grid, torch.float32, search=False)
    assert torch.equal(quantized.codes, nearest.codes)
    assert torch.equal(quantized.dequantize(), nearest.dequantize())


def test_white_inputs_give_rounding_to_nearest_on_searched_scales_with_headroom():
    weight, _ = make_problem(seed=4, columns=64)
    grid = Grid(4, 32, symmetric=False)
    quantized = gptq(weight, factorize(torch.eye(64)), grid, torch.float32)
    scales, zeros = (t.float().repeat_interleave(32, 1) for t in (quantized.scales, quantized.zero_points))
    assert torch.equal(quantized.codes.float(), grid.round(weight, scales, zeros))
    searched = rtn(weight, grid, torch.float32).scales
    torch.testing.assert_close(quantized.scales, searched * (1 + HEADROOM / 4))


@pytest.mark.parametrize("act_order", [True, False])
def test_columns_that_are_never_excited_go_to_the_nearest_value(act_order):
    weight, gram = make_problem(seed=5, columns=64)
    dead = torch.tensor([3, 17, 40])
    gram[dead] = 0
    gram[:, dead] = 0
    grid = Grid(4, 32)
    factor = factorize(gram, 0.01, act_order)
    assert factor.dead == 3
    quantized = gptq(weight, factor, grid, torch.float32)
    nearest = grid.round(weight, quantized.scales.repeat_interleave(32, 1), None)
    assert torch.equal(quantized.codes[:, dead].float(), nearest[:, dead])
    assert quantized.codes[:, dead].count_nonzero() > 10  # and not to zero
    assert not torch.equal(quantized.codes.float(), nearest)
    assert_as_in_the_textbook(weight, gram, grid, torch.float32, True, act_order)


def test_columns_that_are_never_excited_need_no_damping():
    _, gram = make_problem(seed=5, columns=64)
    gram[7] = gram[:, 7] = 0
    assert factorize(gram, 0.0).damping == 0.0


def test_inputs_that_are_all_zero_give_rounding_to_nearest():
    weight, _ = make_problem(seed=6, columns=32)
    factor = factorize(torch.zeros(32, 32))
    assert factor.dead == 32
    quantized = gptq(weight, factor, Grid(4), torch.float32)
    assert torch.equal(quantized.codes.float(), Grid(4).round(weight, quantized.scales, None))


@pytest.mark.parametrize("symmetric", [True, False])
def test_stacked_rows_give_what_they_give_alone(symmetric):
    weight, gram = make_problem(seed=8, rows=12, columns=160)
    grid, factor = Grid(4, 32, symmetric), factorize(gram)
    stacked = gptq(weight, factor, grid, torch.bfloat16)
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        alone = gptq(weight[rows], factor, grid, torch.bfloat16)
        part = stacked.rows(rows.start, rows.stop)
        assert torch.equal(part.codes, alone.codes)
        assert torch.equal(part.scales, alone.scales)
        assert symmetric or torch.equal(part.zero_points, alone.zero_points)


def test_arguments_are_left_alone():
    weight, gram = make_problem(seed=9, columns=64)
    gram[5] = gram[:, 5] = 0
    weight_before, gram_before = weight.clone(), gram.clone()
    factor = factorize(gram)
    feedback = factor.feedback.clone()
    gptq(weight, factor, Grid(4, 32, symmetric=False), torch.bfloat16)
    assert torch.equal(weight, weight_before)
    assert torch.equal(gram, gram_before)
    assert torch.equal(factor.feedback, feedback)


# the factor


@pytest.mark.parametrize("act_order", [True, False])
def test_factor_is_unit_upper_triangular_and_leaves_a_diagonal(act_order):
    _, gram = make_problem(seed=10, columns=48)
    factor = factorize(gram, 0.01, act_order)
    assert torch.equal(factor.feedback, factor.feedback.triu(1))
    unit = factor.feedback.double() + torch.eye(48, dtype=torch.float64)
    ordered = damp(gram, 0.01)[factor.order][:, factor.order]
    inverse = torch.linalg.inv(unit)
    diagonal = inverse @ ordered @ inverse.T
    assert (diagonal.diagonal() > 0).all()
    torch.testing.assert_close(factor.importance[factor.order].double(), diagonal.diagonal(), rtol=1e-4, atol=0)
    off = diagonal - diagonal.diagonal().diag()
    assert off.abs().max() < 1e-5 * ordered.diagonal().max()


def test_most_excited_columns_come_first():
    _, gram = make_problem(seed=12, columns=48)
    factor = factorize(gram, act_order=True)
    excitation = gram.diagonal()[factor.order]
    assert (excitation[:-1] >= excitation[1:]).all()
    assert factor.order.sort().values.tolist() == list(range(48))
    assert factorize(gram, act_order=False).order.tolist() == list(range(48))


def test_damping_that_suffices_is_the_one_that_is_reported():
    _, gram = make_problem(seed=13, columns=32)
    assert factorize(gram, 0.01).damping == 0.01
    assert factorize(gram, 0.0).damping == 0.0


def test_damping_grows_for_a_singular_matrix_and_is_reported():
    weight, _ = make_problem(seed=14, columns=16)
    gram = torch.ones(16, 16)  # every input is the same
    factor = factorize(gram, 0.0)
    assert factor.damping == pytest.approx(4e-4)
    assert torch.isfinite(factor.feedback).all()
    quantized = gptq(weight, factor, Grid(4), torch.float32)
    nearest = rtn(weight, Grid(4), torch.float32, search=False)
    # all errors can make up for each other, so next to nothing is lost
    assert objective(weight, quantized.dequantize(), gram).sum() < objective(weight, nearest.dequantize(), gram).sum()


def test_damping_grows_for_an_indefinite_matrix_until_it_is_enough():
    gram = torch.tensor([[1.0, 1.3], [1.3, 1.0]])  # the least eigenvalue is -0.3
    assert factorize(gram, 0.01).damping == pytest.approx(0.64)  # after 0.01, 0.04 and 0.16


def test_codes_are_those_of_the_damping_that_is_reported():
    weight, gram = make_problem(seed=15, columns=24, tokens=8)  # fewer tokens than columns
    gram -= 0.02 * gram.diagonal().mean() * torch.eye(24)
    factor = factorize(gram, 0.01)
    assert factor.damping == pytest.approx(0.04)
    grid = Grid(4)
    quantized = gptq(weight, factor, grid, torch.float32, search=False)
    expected, closest = textbook_gptq(weight, damp(gram, 0.04), factor.order, quantized.scales, None, grid)
    decided = closest > 10 * UNDECIDED
    assert decided.any()
    assert torch.equal(quantized.codes[decided], expected[decided])


@pytest.mark.parametrize(
    "gram",
    [
        torch.full((4, 4), float("nan")),
        torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]),
        torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]),
        -torch.eye(4),
        torch.tensor([[1.0, 1e6], [1e6, 1.0]]),
    ],
    ids=["nan", "nan beside the diagonal", "infinity", "negative", "far from definite"],
)
def test_matrices_that_no_damping_helps_are_refused(gram):
    with pytest.raises(NotPositiveDefiniteError):
        factorize(gram)


# E4M3


def textbook_gptq_on_e4m3(weight, damped, order, scales):
    """
    The textbook's column sweep in float64, with the nearest of all E4M3 values found by trying them.

    Returns:
        values in the order of the columns, and for every row how close to a tie its closest call was, in steps.
    """
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = table[table.isfinite()].unique()
    left = weight.double()[:, order].clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    values = torch.empty_like(left)
    closest = torch.full((len(weight),), float("inf"), dtype=torch.float64)
    for step, column in enumerate(order.tolist()):
        scale = scales.double()[:, 0]
        two = ((left[:, step] / scale).unsqueeze(-1) - table).abs().topk(2, largest=False)
        gap = (table[two.indices[:, 0]] - table[two.indices[:, 1]]).abs()
        closest = torch.minimum(closest, (two.values[:, 1] - two.values[:, 0]) / gap)
        values[:, column] = table[two.indices[:, 0]] * scale
        error = (left[:, step] - values[:, column]) / upper[step, step]
        left[:, step + 1 :] -= error[:, None] * upper[step, step + 1 :]
    return values, closest


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_codes_are_those_of_the_textbook(dtype, search, act_order):
    weight, gram = make_problem(seed=3, rows=16)
    factor = factorize(gram, 0.01, act_order)
    quantized = gptq(weight, factor, Grid(8, type="float"), dtype, search)
    assert quantized.codes.dtype == torch.float8_e4m3fn
    scales, _ = choose_scales(weight, factor.importance, quantized.grid, dtype, search)
    assert torch.equal(quantized.scales, scales)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(gram))
    expected, closest = textbook_gptq_on_e4m3(weight, damp(gram, 0.01), order, scales)
    decided = closest > 2 * UNDECIDED
    assert decided.float().mean() >= 0.5
    torch.testing.assert_close(quantized.dequantize().double()[decided], expected[decided], rtol=1e-6, atol=0)


def test_feedback_pays_on_float_codes():
    weight, gram = make_problem(seed=5, rows=32, columns=128)
    grid = Grid(8, type="float")
    solved = gptq(weight, factorize(gram), grid, torch.float32).dequantize()
    nearest = rtn(weight, grid, torch.float32).dequantize()
    assert objective(weight, solved, gram).sum() < 0.8 * objective(weight, nearest, gram).sum()
