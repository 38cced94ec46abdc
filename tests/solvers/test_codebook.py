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
"""Codebooks: the levels are the best there are, and codes and levels improve each other."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.solvers.codebook import Levels, _losses, _refitted, _swept, best_codebooks, gptq_codebook
from hfcompress.solvers.gptq import factorize, gptq
from hfcompress.solvers.grid import Grid


ALL = torch.empty(0, 0, dtype=torch.bool)  # of the weights are kept


def problem(seed: int = 0, rows: int = 48, columns: int = 96):
    """A weight with heavy tails, and a Gram matrix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = normal(1000, 30) @ normal(30, columns) * 0.3 + normal(1000, columns)
    return normal(rows, columns) * normal(rows, columns).abs().sqrt(), inputs.T @ inputs / 1000


def loss(weight, values, gram) -> float:
    error = (weight - values).double()
    return ((error @ gram.double()) * error).sum().item()


@given(
    st.lists(st.tuples(st.floats(-4, 4, width=32), st.floats(0, 3, width=32)), min_size=1, max_size=8),
    st.integers(1, 4),
)
@settings(max_examples=80, deadline=None)
def test_no_other_levels_lose_less(entries, size):
    """Against every way to cut the sorted values."""
    values, weights = (torch.tensor(each) for each in zip(*entries, strict=True))
    [levels] = best_codebooks(values[None], weights, size)
    assert torch.equal(levels, levels.sort().values)
    found = (weights * (values[:, None] - levels).abs().min(1).values.double().square()).sum().item()
    ascending, order = values.double().sort()
    weights, least = weights.double()[order], float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(values) + 1), size - 1):
        total = 0.0
        for first, last in itertools.pairwise((0, *cuts, len(values))):
            x, w = ascending[first:last], weights[first:last]
            if w.sum() > 0:
                total += (w * (x - (w * x).sum() / w.sum()).square()).sum().item()
        least = min(least, total)
    assert found <= least + 1e-5 * (1 + least)


def test_codes_are_those_of_the_obvious_loop():
    weight, gram = problem()
    factor = factorize(gram)
    levels = best_codebooks(weight, factor.importance, 8)
    order = factor.order
    found = _swept(weight.T[order].contiguous(), factor, levels, ALL)
    errors, codes = torch.zeros(weight.T.shape, dtype=torch.float64), torch.zeros(weight.T.shape, dtype=torch.long)
    for place, column in enumerate(order.tolist()):
        value = weight[:, column].double() + factor.feedback[:place, place].double() @ errors[:place]
        codes[place] = (value[:, None] - levels.double()).abs().argmin(1)
        errors[place] = weight[:, column].double() - levels.double().gather(1, codes[place][:, None]).squeeze(1)
    assert (codes == found.codes.T).float().mean() > 0.999  # ties


def test_levels_for_given_codes_are_the_solution_of_least_squares():
    weight, gram = problem()
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(4, weight.shape, generator=generator, dtype=torch.uint8)
    found = _refitted(weight.T.contiguous(), Levels(codes, torch.zeros(len(weight), 4)), gram, sparse=False)
    root = torch.linalg.cholesky(gram.double()).T  # root^T root = gram
    for row in range(0, len(weight), 7):
        chosen = torch.nn.functional.one_hot(codes[row].long(), 4).double()
        wanted = torch.linalg.lstsq(root @ chosen, (root @ weight[row].double())[:, None]).solution.squeeze(1)
        torch.testing.assert_close(found[row].double(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_of_a_row_lose_less_than_a_grid_and_rounds_lose_less_still(bits):
    weight, gram = problem(rows=64, columns=128)
    factor = factorize(gram)
    grid = loss(weight, gptq(weight, factor, Grid(bits, -1), torch.float16).dequantize(), gram)
    losses = []
    for rounds in (0, 1, 3):
        found = gptq_codebook(weight, weight, gram, factor, 2**bits, torch.float16, rounds)
        assert found.codes.max() < 2**bits
        assert torch.equal(found.levels, found.levels.half().float())
        losses.append(loss(weight, found.values(), gram))
    assert grid * 0.9 > losses[0] > losses[1] >= losses[2]


def test_the_rows_do_not_depend_on_one_another():
    weight, gram = problem()
    factor = factorize(gram)
    whole = gptq_codebook(weight, weight, gram, factor, 8, torch.float16)
    part = gptq_codebook(weight[10:20], weight[10:20], gram, factor, 8, torch.float16)
    assert (whole.values()[10:20] == part.values()).float().mean() > 0.99  # a GEMM of another size rounds otherwise


@pytest.mark.parametrize("rounds", [0, 3])
def test_zeros_stay_and_the_other_levels_are_for_the_others(rounds):
    weight, gram = problem(rows=64, columns=128)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) > 0.5
    weight = weight * keep
    factor = factorize(gram)
    found = gptq_codebook(weight, weight, gram, factor, 8, torch.float16, rounds, keep)
    assert ((found.levels == 0).sum(1) >= 1).all()
    assert (found.values()[~keep] == 0).all()
    assert (found.values()[keep] != 0).float().mean() > 0.7
    blind = gptq_codebook(weight, weight, gram, factor, 8, torch.float16, rounds)
    assert loss(weight, found.values(), gram) < loss(weight, blind.values() * keep, gram)


def test_the_target_is_met_and_fewer_values_than_levels_are_met_exactly():
    weight, gram = problem()
    factor = factorize(gram)
    target = weight + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    found = gptq_codebook(weight, target, gram, factor, 8, torch.float16)
    assert loss(target, found.values(), gram) < loss(weight, found.values(), gram)
    few = torch.tensor([-1.0, 0.5, 2.0])[torch.randint(3, weight.shape, generator=torch.Generator().manual_seed(3))]
    assert torch.equal(gptq_codebook(few, few, gram, factor, 4, torch.float16).values(), few)


def test_the_objective_is_its_definition():
    weight, gram = problem()
    levels = best_codebooks(weight, torch.ones(weight.shape[1]), 4)
    codes = (weight[:, :, None] - levels[:, None]).abs().argmin(2).to(torch.uint8)
    found = _losses(weight.T.contiguous(), Levels(codes, levels), gram).sum().item()
    assert found == pytest.approx(loss(weight, Levels(codes, levels).values(), gram), rel=1e-5)
