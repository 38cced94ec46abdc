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
"""Vector quantization: against the obvious loops, against grids of the same bits, and rounds that only improve."""

from dataclasses import replace

import pytest
import torch

from hfcompress.kernels.vectors import _nearest
from hfcompress.solvers.curvature import factorize_rows
from hfcompress.solvers.gptq import factorize, gptq
from hfcompress.solvers.grid import Grid, books_of
from hfcompress.solvers.objective import Objective
from hfcompress.solvers.vectors import (
    Vectors,
    descend,
    first_vectors,
    gptq_vectors,
    refitted,
    rescaled,
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


def outputs(rows: int, blocks: int):
    """What outputs are worth, in blocks of different worth."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for number in range(blocks):
        gradients = torch.randn(300, rows // blocks, generator=generator)
        gradients += torch.randn(300, 1, generator=generator)
        found.append((number + 1) * gradients.T @ gradients / 300)
    return found


def exact_loss(weight, values, gram, worth=None) -> float:
    error = (weight - values).double()
    slopes = error @ gram.double()
    return ((slopes if worth is None else worth.double() @ slopes) * error).sum().item()


def damped(objective: Objective):
    """`C` as the objective has it: float64 `(rows, rows)`, in the order of its rows."""
    curvature, rows = objective.curvature.double(), objective.rows
    found = torch.zeros(len(curvature), len(curvature), dtype=torch.float64)
    for start, stop in zip(rows.starts.tolist(), rows.stops.tolist(), strict=True):
        found[start:stop, start:stop] = curvature[start:stop, : stop - start]
    return found


def begun(objective: Objective, length: int, tables: int = 1, entries: int = ENTRIES) -> Vectors:
    """Vectors and numbers that can be improved."""
    scales = objective.target.square().mean(1).sqrt()
    vectors = first_vectors(objective.target / scales[:, None], objective.importance, length, 0, entries, tables)[None]
    book = torch.zeros(len(scales), dtype=torch.int64)
    return Vectors(sweep(objective, scales, vectors, book), scales, vectors, book)


@pytest.mark.parametrize(("length", "blocks"), [(2, 0), (4, 0), (8, 0), (1, 2), (4, 3)])
def test_numbers_are_those_of_the_obvious_loop(length, blocks):
    """Every vector tried, what it costs and hands on computed in float64 from the definition `z = W^T E U`."""
    weight, gram = problem(rows=24)
    rows = factorize_rows(outputs(24, blocks)) if blocks else None
    objective = Objective.of(weight, gram, factorize(gram, act_order=False), rows)
    target = objective.target.double()
    vectors = torch.randn(ENTRIES, length, generator=torch.Generator().manual_seed(1))
    scales = objective.target.square().mean(1).sqrt()
    [found] = sweep(objective, scales, vectors[None, None], torch.zeros(24, dtype=torch.int64)).unbind(2)
    across = objective.feedback.double() + torch.eye(len(gram), dtype=torch.float64)
    down = torch.eye(24, dtype=torch.float64)
    for start, stop in zip(objective.rows.starts.tolist(), objective.rows.stops.tolist(), strict=True):
        down[start:stop, start:stop] += objective.rows.feedback[start:stop, : stop - start].double()
    errors, codes = torch.zeros(weight.shape, dtype=torch.float64), torch.zeros(found.shape, dtype=torch.long)
    for number in range(codes.shape[1]):
        part = slice(number * length, (number + 1) * length)
        for row in range(24):
            tried = target[row, part] - vectors.double() * scales[row].double()
            fed = down[: row + 1, row] @ errors[: row + 1] @ across[:, part]
            lost = fed + tried @ across[part, part]
            codes[row, number] = (lost.square() * objective.importance[part].double()).sum(1).argmin()
            errors[row, part] = tried[codes[row, number]]
    assert (found == codes).float().mean() > 0.995  # ties


@pytest.mark.parametrize(("length", "tables", "blocks"), [(4, 1, 0), (4, 1, 2), (1, 1, 2), (8, 2, 2)])
def test_moving_a_number_is_to_where_the_objective_is_least(length, tables, blocks):
    """Against each number's every value tried one after the other with the whole objective in float64."""
    weight, gram = problem(rows=8, columns=32)
    rows = factorize_rows(outputs(8, blocks)) if blocks else None
    objective = Objective.of(weight, gram, factorize(gram, act_order=False), rows)
    before = begun(objective, length, tables, 16)
    worth, target, h = damped(objective), objective.target.double(), objective.gram.double()
    found = descend(objective, before, beam=16)
    error, codes = target - before.values().double(), before.codes.clone()
    every = torch.cartesian_prod(*[torch.arange(16)] * tables).view(-1, tables)
    values = summed(before.vectors[0], every).double()
    for number in range(codes.shape[1]):
        part = slice(number * length, (number + 1) * length)
        for row in range(8):
            scale = before.scales[row].double()
            at_hand = summed(before.vectors[0], codes[row, number][None]).double()[0] * scale
            moves = values * scale - at_hand
            slopes = worth[row] @ error @ h[:, part]
            changes = -2 * moves @ slopes + worth[row, row] * ((moves @ h[part, part]) * moves).sum(1)
            best = changes.argmin()
            codes[row, number] = every[best]
            error[row, part] -= moves[best]
    same = (found == codes).float().mean()
    assert same > 0.99
    after = replace(before, codes=found)
    assert objective.loss(after.values()) < objective.loss(before.values())


def test_the_objective_is_its_definition():
    weight, gram = problem()
    codes = torch.randint(ENTRIES, (96, 36, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = Vectors(codes, torch.rand(96), torch.randn(3, 2, ENTRIES, 4), books_of(96, 3))
    assert found.book.bincount().tolist() == [32, 32, 32]
    for row in (5, 70):
        own = found.vectors[row // 32]
        place = own[0, int(codes[row, 7, 0])] + own[1, int(codes[row, 7, 1])]
        torch.testing.assert_close(found.values()[row, 28:32], place * found.scales[row])
    for rows in (None, factorize_rows(outputs(96, 3))):
        objective = Objective.of(weight, gram, factorize(gram, damping=0.0, act_order=False), rows)
        wanted = exact_loss(objective.target, found.values(), gram, damped(objective))
        assert objective.loss(found.values()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.parametrize(("length", "tables", "entries"), [(4, 1, ENTRIES), (8, 2, 64)])
def test_better_vectors_and_scales_for_given_numbers_are_near_the_best(length, tables, entries, blocks):
    weight, gram = problem(rows=400, columns=64)
    rows = factorize_rows(outputs(400, blocks)) if blocks else None
    objective = Objective.of(weight, gram, factorize(gram, act_order=False), rows)
    before = begun(objective, length, tables, entries)
    for improved in (
        lambda found: replace(found, vectors=refitted(objective, found)),
        lambda found: replace(found, scales=rescaled(objective, found)),
    ):
        after = better = improved(before)
        for _ in range(20):
            better = improved(better)
        losses = [objective.loss(each.values()) for each in (before, after, better)]
        assert losses[2] <= losses[1] * 1.0001 < losses[0]
        assert losses[1] < 1.02 * losses[2]


def summed(vectors, codes):
    """The sums of one vector of each table: `(*, length)` for `(tables, entries, length)` and `(*, tables)`."""
    return sum(table[number.int()] for table, number in zip(vectors, codes.unbind(-1), strict=True))


def nearest_sums(points, vectors, beam):
    """What the kernel finds, point by point: int64 `(points, tables)`."""
    tables, entries, length = vectors.shape
    rooted, squares = vectors.transpose(1, 2).contiguous().numpy(), vectors.square().sum(2).numpy()
    room = [torch.empty(shape).numpy() for shape in ((entries,), (2, beam, length), (2, beam))]
    paths, spare = (torch.zeros(beam, tables, dtype=torch.int64) for _ in range(2))
    found = []
    for point in points:
        _nearest(point.numpy(), rooted, squares, beam, *room, paths.numpy(), spare.numpy())
        found.append(paths[0].clone())
    return torch.stack(found)


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
    objective = Objective.of(weight, gram, factor)
    losses = []
    for beam in (1, 4):
        swept = replace(two, codes=sweep(objective, two.scales, two.vectors, two.book, beam=beam))
        losses.append(exact_loss(weight, swept.values(), gram))
    assert losses[1] < losses[0]


def test_what_outputs_are_worth_is_made_use_of():
    weight, gram = problem(rows=256, columns=128)
    factor, worth = factorize(gram, act_order=False), outputs(256, 2)
    blind = gptq_vectors(weight, gram, factor, 4, torch.float16, 3)
    found = gptq_vectors(weight, gram, factor, 4, torch.float16, 3, rows=factorize_rows(worth))
    losses = [exact_loss(weight, each.values(), gram, torch.block_diag(*worth)) for each in (found, blind)]
    assert losses[0] < 0.85 * losses[1]


def test_what_a_choice_costs_besides_is_weighed_against_what_it_loses():
    weight, gram = problem(rows=64, columns=64)
    objective = Objective.of(weight, gram, factorize(gram, act_order=False))
    found = begun(objective, 4)
    prices = torch.linspace(0, 1, ENTRIES)[None]
    paid = []
    for factor in (0.0, 1.0, 100.0):
        codes = sweep(objective, found.scales, found.vectors, found.book, factor * prices[None])
        codes = descend(objective, replace(found, codes=codes), factor * prices[None])
        paid.append((prices[0][codes.int()].sum().item(), objective.loss(replace(found, codes=codes).values())))
    assert paid[0][0] > paid[1][0] > paid[2][0]
    assert paid[0][1] < paid[1][1] < paid[2][1]


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


@pytest.mark.parametrize(("length", "bits", "most"), [(2, 4, 0.9), (4, 2, 0.7)])
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


def test_rows_with_books_of_their_own_are_solved_as_if_alone():
    """Where rows do not depend on one another, two books are what two weights would get."""
    weight, gram = problem(rows=512, columns=64)
    weight[256:] = weight[256:].abs()
    factor, own = factorize(gram, act_order=False), (4, torch.float16, 2)
    both = gptq_vectors(weight, gram, factor, *own, books=2)
    halves = [gptq_vectors(part, gram, factor, *own) for part in weight.split(256)]
    assert both.vectors.shape == (2, 1, 256, 4)
    lost = [exact_loss(weight, each, gram) for each in (both.values(), torch.cat([h.values() for h in halves]))]
    assert lost[0] == pytest.approx(lost[1], rel=0.02)
    assert lost[0] < exact_loss(weight, gptq_vectors(weight, gram, factor, *own).values(), gram)


def test_books_stand_beside_what_outputs_are_worth():
    """The rows' order in the sweep is another than that of the books."""
    weight, gram = problem(rows=256, columns=64)
    weight[100:] = weight[100:].abs()
    factor, worth = factorize(gram, act_order=False), outputs(256, 2)
    own = (4, torch.float16, 2)
    losses = []
    for books in (1, 3):
        found = gptq_vectors(weight, gram, factor, *own, entries=64, rows=factorize_rows(worth), books=books)
        assert len(found.vectors) == books
        losses.append(exact_loss(weight, found.values(), gram, torch.block_diag(*worth)))
    assert losses[1] < losses[0]


def test_more_entries_than_a_byte_numbers_lose_less():
    weight, gram = problem(rows=512, columns=256)
    factor = factorize(gram, act_order=False)
    losses = []
    for entries in (256, 1024):
        found = gptq_vectors(weight, gram, factor, 4, torch.float16, 1, entries=entries)
        assert found.codes.dtype == (torch.uint8 if entries == 256 else torch.int32)
        losses.append(exact_loss(weight, found.values(), gram))
    assert found.codes.max() > 255
    assert losses[1] < 0.75 * losses[0]
