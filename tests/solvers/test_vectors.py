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
"""Vector quantization: against the obvious loop, against grids of the same bits, and rounds that only improve."""

import pytest
import torch

from hfcompress.solvers.gptq import factorize, gptq
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.vectors import (
    Inputs,
    Vectors,
    first_vectors,
    gptq_vectors,
    k_means,
    loss,
    nearest_sums,
    refitted,
    summed,
    sweep,
)


ENTRIES = 256


def problem(rows: int = 96, columns: int = 144, seed: int = 0):
    """A weight and a Gram matrix; more columns than a lazy block has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = normal(1000, 30) @ normal(30, columns) * 0.3 + normal(1000, columns)
    return normal(rows, columns) * (0.5 * normal(rows, 1)).exp(), inputs.T @ inputs / 1000


def exact_loss(weight, values, gram) -> float:
    error = (weight - values).double()
    return ((error @ gram.double()) * error).sum().item()


@pytest.mark.parametrize("length", [2, 4, 8])
def test_numbers_are_those_of_the_obvious_loop(length):
    """Every vector tried, what it costs and hands on computed in float64 from the definition `z = E U`."""
    weight, gram = problem(rows=24)
    factor = factorize(gram, act_order=False)
    vectors = torch.randn(ENTRIES, length, generator=torch.Generator().manual_seed(1))
    scales = weight.square().mean(1).sqrt()
    [found] = sweep(weight, scales, vectors[None], Inputs(factor.feedback, factor.importance)).unbind(2)
    unit = factor.feedback.double() + torch.eye(len(gram), dtype=torch.float64)
    errors, codes = torch.zeros(weight.shape, dtype=torch.float64), torch.zeros(found.shape, dtype=torch.long)
    for number in range(codes.shape[1]):
        part = slice(number * length, (number + 1) * length)
        tried = weight[:, None, part].double() - vectors.double() * scales.double()[:, None, None]
        lost = (errors @ unit[:, part])[:, None] + tried @ unit[part, part]
        codes[:, number] = (lost.square() * factor.importance[part].double()).sum(2).argmin(1)
        errors[:, part] = tried[torch.arange(len(weight)), codes[:, number]]
    assert (found == codes).float().mean() > 0.995  # ties


def test_the_objective_is_its_definition():
    weight, gram = problem()
    codes = torch.randint(ENTRIES, (96, 36, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = Vectors(codes, torch.rand(96), torch.randn(2, ENTRIES, 4))
    place = found.vectors[0, int(codes[5, 7, 0])] + found.vectors[1, int(codes[5, 7, 1])]
    torch.testing.assert_close(found.values()[5, 28:32], place * found.scales[5])
    assert loss(weight, found, gram) == pytest.approx(exact_loss(weight, found.values(), gram), rel=1e-4)


def test_means_lose_less_than_what_they_begin_with_and_are_means():
    weight, _ = problem(rows=200, columns=160)
    costs = torch.rand(160, generator=torch.Generator().manual_seed(2)) + 0.1
    points, weights = weight.view(-1, 4).double(), costs.view(-1, 4).repeat(200, 1).double()

    def lost(vectors):
        each = (weights[:, None] * (points[:, None] - vectors.double()).square()).sum(2).min(1)
        return each.values.sum().item(), each.indices

    found = k_means(points.float(), weights.float(), ENTRIES, seed=0)
    total, nearest = lost(found)
    assert (
        total
        < 0.7 * lost(points[torch.randperm(len(points), generator=torch.Generator().manual_seed(3))[:ENTRIES]])[0]
    )
    moved = found.clone()
    for number in nearest.unique().tolist():
        own = nearest == number
        moved[number] = ((weights[own] * points[own]).sum(0) / weights[own].sum(0)).float()
    assert lost(moved)[0] == pytest.approx(total, rel=0.01)  # next to nothing is left to gain


@pytest.mark.parametrize(("length", "tables", "entries"), [(4, 1, ENTRIES), (8, 2, 64)])
def test_better_vectors_for_given_numbers_are_near_the_best(length, tables, entries):
    weight, gram = problem(rows=400, columns=64)
    scales = weight.square().mean(1).sqrt()
    factor = factorize(gram, act_order=False)
    inputs = Inputs(factor.feedback, factor.importance)
    vectors = first_vectors(weight / scales[:, None], factor.importance, length, 0, entries, tables)
    before = Vectors(sweep(weight, scales, vectors, inputs), scales, vectors)
    after = Vectors(before.codes, scales, refitted(weight, before, gram))
    better = after
    for _ in range(20):
        better = Vectors(before.codes, scales, refitted(weight, better, gram))
    losses = [loss(weight, each, gram) for each in (before, after, better)]
    assert losses[2] <= losses[1] * 1.0001 < losses[0]
    assert losses[1] < 1.02 * losses[2]


@pytest.mark.parametrize("tables", [1, 2, 3])
def test_sums_are_near_the_nearest(tables):
    """Against every sum there is: with a wide beam the same, with a narrow one nearly, and never better."""
    generator = torch.Generator().manual_seed(tables)
    points, vectors = torch.randn(50, 3, generator=generator), torch.randn(tables, 8, 3, generator=generator)
    every = torch.cartesian_prod(*[torch.arange(8)] * tables).view(-1, tables)
    distances = (points[:, None] - summed(vectors, every)).square().sum(2)
    least = distances.min(1).values
    for beam, most in ((8 ** (tables - 1), 1.0001), (16, 1.5)):
        found = nearest_sums(points, vectors, beam)
        own = (points - summed(vectors, found)).square().sum(1)
        assert (own >= least - 1e-5).all()
        assert own.sum() <= most * least.sum()


def test_two_tables_lose_less_than_one_of_the_same_bits():
    weight, gram = problem(rows=512, columns=256)
    factor = factorize(gram, act_order=False)
    one = gptq_vectors(weight, gram, factor, 4, torch.float16, 2)
    two = gptq_vectors(weight, gram, factor, 8, torch.float16, 2, tables=2)
    assert one.codes.numel() == two.codes.numel()
    assert exact_loss(weight, two.values(), gram) < exact_loss(weight, one.values(), gram)
    beam = Inputs(factor.feedback, factor.importance)
    greedy = Vectors(sweep(weight, two.scales, two.vectors, beam, beam=1), two.scales, two.vectors)
    assert exact_loss(weight, two.values(), gram) < exact_loss(weight, greedy.values(), gram)


@pytest.mark.parametrize("rounds", [0, 3])
def test_single_weights_keep_their_zeros_and_lose_less_for_it(rounds):
    weight, gram = problem(rows=128, columns=128)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(6)) > 0.5
    weight = weight * keep
    found = gptq_vectors(
        weight, gram, factorize(gram, act_order=False), 1, torch.float16, rounds, entries=8, keep=keep
    )
    assert found.codes.max() < 8
    assert (found.values()[~keep] == 0).all()
    assert (found.values()[keep] != 0).float().mean() > 0.7
    blind = gptq_vectors(weight, gram, factorize(gram, act_order=False), 1, torch.float16, rounds, entries=8)
    kept = blind.values() * keep
    assert exact_loss(weight, found.values(), gram) < exact_loss(weight, kept, gram)


@pytest.mark.parametrize(("length", "bits", "most"), [(2, 4, 0.95), (4, 2, 0.8)])
def test_it_loses_less_than_a_grid_of_the_same_bits_and_rounds_only_improve(length, bits, most):
    weight, gram = problem(rows=512, columns=256)
    grid = gptq(weight, factorize(gram), Grid(bits, 128), torch.float16)
    factor = factorize(gram, act_order=False)
    losses = []
    for rounds in (0, 1, 3):
        found = gptq_vectors(weight, gram, factor, length, torch.float16, rounds)
        assert torch.equal(found.vectors, found.vectors.half().float())
        assert torch.equal(found.scales, found.scales.half().float())
        losses.append(exact_loss(weight, found.values(), gram))
    assert losses[0] >= losses[1] * 0.9999 >= losses[2] * 0.9998
    assert losses[2] < most * exact_loss(weight, grid.dequantize(), gram)


def test_fewer_vectors_than_there_is_room_for_are_met():
    _, gram = problem(columns=64)
    few = torch.randn(30, 4, generator=torch.Generator().manual_seed(4))
    weight = few[torch.randint(30, (64, 16), generator=torch.Generator().manual_seed(5))].flatten(1)
    weight = weight / weight.square().mean(1).sqrt()[:, None]
    found = gptq_vectors(weight, gram, factorize(gram, act_order=False), 4, torch.float32)
    assert exact_loss(weight, found.values(), gram) < 0.1 * exact_loss(weight, torch.zeros_like(weight), gram)


def test_a_row_of_zeros_stays_one():
    weight, gram = problem(rows=64, columns=64)
    weight[3] = 0
    found = gptq_vectors(weight, gram, factorize(gram, act_order=False), 4, torch.float16)
    assert torch.isfinite(found.values()).all()
    assert found.values()[3].abs().max() < 1e-3
