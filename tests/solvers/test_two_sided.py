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
"""Feedback along columns and rows: against the obvious loop in float64, and against trying every combination."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gptq import make_problem

from hfcompress.solvers.curvature import RowFactor, factorize_rows, indifferent
from hfcompress.solvers.gptq import factorize, gptq
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.two_sided import gptq_two_sided


def make_curvature(rows, seed=0, samples=64):
    """Covariance of correlated gradients."""
    generator = torch.Generator().manual_seed(seed + 100)
    mixing = torch.eye(rows) + torch.randn(rows, rows, generator=generator) / rows**0.5
    gradients = torch.randn(samples, rows, generator=generator) @ mixing
    return gradients.T @ gradients / samples


def whole(rows: RowFactor) -> torch.Tensor:
    """The curvature as one float64 matrix, rows in their original order."""
    size = len(rows.order)
    dense = torch.zeros(size, size, dtype=torch.float64)
    for start, stop in zip(rows.starts.tolist(), rows.stops.tolist(), strict=True):
        dense[start:stop, start:stop] = rows.curvature[start:stop, : stop - start].double()
    unordered = torch.empty_like(dense)
    unordered[rows.order[:, None], rows.order] = dense
    return unordered


def loss(weight, quantized, gram, rows, factor) -> float:
    """`tr(C E H E^T)` in float64, both matrices damped as the solver sees them."""
    error = (weight - quantized.dequantize()).double()[:, factor.order]
    return ((whole(rows) @ error @ factor.damped(gram).double()) * error).sum().item()


def obvious(weight, gram, curvature, scales, zero_points, grid, factor, rows):
    """
    Babai's nearest plane on the Kronecker product, entry by entry: every entry is put where the objective is least,
    with those before it fixed and those after it free to make up for it.
    """
    out_features, in_features = weight.shape
    order = [(r, c) for c in factor.order.tolist() for r in rows.order.tolist()]
    index = [r * in_features + c for r, c in order]
    damped = torch.empty_like(gram, dtype=torch.float64)
    damped[factor.order[:, None], factor.order] = factor.damped(gram).double()
    metric = torch.kron(whole(rows), damped)[index][:, index]
    inverse = torch.linalg.inv(metric)
    upper = torch.linalg.cholesky(inverse, upper=True)  # GPTQ's own recursion, on the weight as one long row
    values = torch.tensor([weight[r, c].item() for r, c in order], dtype=torch.float64)
    group = grid.columns(in_features)
    codes = torch.zeros(out_features, in_features, dtype=torch.int64)
    closest = 1.0
    for position, (r, c) in enumerate(order):
        scale = scales[r, c // group].double().item()
        zero = 0 if zero_points is None else int(zero_points[r, c // group])
        exact = values[position].item() / scale
        closest = min(closest, abs(exact - round(exact)).__rsub__(0.5))
        code = min(max(round(exact) + zero, grid.q_min), grid.q_max)
        codes[r, c] = code
        error = (values[position] - (code - zero) * scale) / upper[position, position]
        values[position:] -= error * upper[position, position:]
    return codes, closest


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", [(6,), (3, 3), (4, 2), (1,) * 6])
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_those_of_the_obvious_loop(bits, blocks, symmetric):
    weight, gram = make_problem(seed=bits, rows=6, columns=32)
    curvature = make_curvature(6)
    parts, start = [], 0
    for size in blocks:
        parts.append(curvature[start : start + size, start : start + size])
        start += size
    grid = Grid(bits, 32, symmetric)
    factor, rows = factorize(gram, 0.01), factorize_rows(parts, 0.1)
    found = gptq_two_sided(weight, weight, gram, factor, rows, grid, torch.float32)
    expected, closest = obvious(weight, gram, curvature, found.scales, found.zero_points, grid, factor, rows)
    assert closest > 1e-5, "a tie: choose another seed"
    assert torch.equal(found.codes.long(), expected)


def test_without_curvature_it_is_gptq():
    weight, gram = make_problem(rows=24, columns=256)
    factor, grid = factorize(gram), Grid(3, 64)
    ours = gptq_two_sided(weight, weight, gram, factor, indifferent(24), grid, torch.bfloat16)
    theirs = gptq(weight, factor, grid, torch.bfloat16)
    assert torch.equal(ours.scales, theirs.scales)
    assert (ours.codes == theirs.codes).float().mean() > 0.998  # sums are formed in another order


@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 3]), symmetric=st.booleans())
@settings(max_examples=15, deadline=None)
def test_it_lies_between_the_optimum_and_what_gptq_finds_in_most_cases(seed, bits, symmetric):
    weight, gram = make_problem(seed, rows=2, columns=32, tokens=16)
    factor, grid = factorize(gram, 0.05), Grid(bits, 32, symmetric)
    rows = factorize_rows([make_curvature(2, seed, samples=3)], 0.05)
    plain = gptq_two_sided(weight, weight, gram, factor, rows, grid, torch.float32)
    refined = gptq_two_sided(weight, weight, gram, factor, rows, grid, torch.float32, rounds=3)
    assert loss(weight, refined, gram, rows, factor) <= loss(weight, plain, gram, rows, factor) * (1 + 1e-4)


def test_curvature_lowers_the_objective_that_it_defines():
    gains = []
    for seed in range(6):
        weight, gram = make_problem(seed, rows=48, columns=128)
        factor, grid, rows = factorize(gram), Grid(2, 64), factorize_rows([make_curvature(48, seed)], 0.1)
        blind = gptq_two_sided(weight, weight, gram, factor, indifferent(48), grid, torch.float32)
        seeing = gptq_two_sided(weight, weight, gram, factor, rows, grid, torch.float32)
        refined = gptq_two_sided(weight, weight, gram, factor, rows, grid, torch.float32, rounds=3)
        losses = [loss(weight, each, gram, rows, factor) for each in (blind, seeing, refined)]
        assert losses[0] > losses[1] > losses[2]
        gains.append(losses[2] / losses[0])
    assert sum(gains) / len(gains) < 0.8


def test_the_best_of_all_codes_is_not_beaten_and_nearly_reached():
    """Four entries, every combination of codes."""
    ratios = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(2, 32, generator=generator)
        weight[:, 2:] = 0.0  # codes of zero are exact there
        inputs = torch.randn(64, 32, generator=generator)
        inputs[:, 1] += 2 * inputs[:, 0]
        gram = inputs.T @ inputs / 64
        gram[2:, :2] = gram[:2, 2:] = 0  # nothing else can make up for these two columns
        factor, grid, rows = factorize(gram, 1e-4), Grid(2, 32), factorize_rows([make_curvature(2, seed)], 1e-3)
        found = gptq_two_sided(weight, weight, gram, factor, rows, grid, torch.float32)
        best = float("inf")
        for codes in itertools.product(range(grid.q_min, grid.q_max + 1), repeat=4):
            candidate = found.codes.clone()
            candidate[:, :2] = torch.tensor(codes, dtype=torch.int8).view(2, 2)
            other = type(found)(candidate, found.scales, None, grid)
            best = min(best, loss(weight, other, gram, rows, factor))
        reached = loss(weight, found, gram, rows, factor)
        assert reached >= best * (1 - 1e-5)
        ratios.append(reached / best)
    assert sorted(ratios)[len(ratios) // 2] < 1.3


def test_what_rows_are_worth_compares_between_blocks():
    """The diagonal of `V F V^T` in the units of the curvature, for rows in their original order."""
    curvatures = [make_curvature(6), 1e-4 * make_curvature(5, seed=1), torch.zeros(3, 3)]
    found = factorize_rows(curvatures, 0.1)
    start = 0
    for block in curvatures[:2]:
        order = found.order[start : start + len(block)] - start
        damped = block.double()[order][:, order]
        damped.diagonal().add_(0.1 * damped.diagonal().mean())
        lower = torch.linalg.cholesky(damped.flip(0, 1))
        wanted = torch.empty(len(block), dtype=torch.float64)
        wanted[order] = lower.diagonal().square().flip(0)
        torch.testing.assert_close(found.importance[start : start + len(block)].double(), wanted, rtol=1e-4, atol=0)
        start += len(block)
    assert torch.allclose(found.importance[start:], 1e-6 * found.importance.max())
    assert torch.equal(factorize_rows(curvatures[2:]).importance, torch.ones(3))


def test_rows_without_gradients_are_rounded_by_their_inputs_alone():
    weight, gram = make_problem(rows=4, columns=64)
    curvature = make_curvature(4)
    curvature[2] = curvature[:, 2] = 0
    factor, grid = factorize(gram), Grid(4, 64)
    found = gptq_two_sided(weight, weight, gram, factor, factorize_rows([curvature]), grid, torch.float32, rounds=2)
    alone = gptq_two_sided(weight, weight, gram, factor, factorize_rows([curvature]), grid, torch.float32)
    assert torch.isfinite(found.dequantize()).all()
    assert torch.equal(alone.codes[2], gptq(weight, factor, grid, torch.float32).codes[2])
    nothing = factorize_rows([torch.zeros(4, 4)])
    assert torch.equal(
        gptq_two_sided(weight, weight, gram, factor, nothing, grid, torch.float32).codes,
        gptq(weight, factor, grid, torch.float32).codes,
    )


def test_the_target_is_met_on_the_scales_of_the_weight():
    weight, gram = make_problem(rows=8, columns=64)
    factor, grid = factorize(gram), Grid(3, 64)
    target = weight + 0.1 * torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    found = gptq_two_sided(weight, target, gram, factor, indifferent(8), grid, torch.float32)
    assert torch.equal(found.scales, gptq(weight, factor, grid, torch.float32).scales)
    rows = indifferent(8)
    unmoved = gptq_two_sided(weight, weight, gram, factor, rows, grid, torch.float32)
    assert loss(target, found, gram, rows, factor) < loss(target, unmoved, gram, rows, factor)
