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

from hfcompress.solvers.codebook import Levels, _descended, _refitted, _swept, best_codebooks, gptq_codebook
from hfcompress.solvers.curvature import factorize_rows
from hfcompress.solvers.gptq import factorize, gptq
from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.mixture import mixture_means
from hfcompress.solvers.objective import Objective


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


def outputs(rows: int):
    """What outputs are worth, in two blocks."""
    gradients = torch.randn(300, 2, rows // 2, generator=torch.Generator().manual_seed(7))
    gradients[:, 1] += torch.randn(300, 1, generator=torch.Generator().manual_seed(8))
    return [own.T @ own / 300 for own in gradients.unbind(1)]


def unfactored(rows, matrix):
    """The blocks that a row factor has of a matrix, put where they belong: float64."""
    found = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    for start, stop in zip(rows.starts.tolist(), rows.stops.tolist(), strict=True):
        found[start:stop, start:stop] = matrix[start:stop, : stop - start].double()
    return found


def begun(curved: bool, groups: int, rows: int = 16, columns: int = 96, size: int = 8):
    """An objective, and levels and codes to begin with."""
    weight, gram = problem(rows=rows, columns=columns)
    own = factorize_rows(outputs(rows)) if curved else None
    objective = Objective.of(weight, gram, factorize(gram), own)
    parts = weight.view(rows, groups, -1)
    levels = torch.stack([best_codebooks(part, torch.ones(part.shape[1]), size) for part in parts.unbind(1)], 1)
    levels, group = levels[objective.rows.order], objective.order // (columns // groups)
    return objective, Levels(_swept(objective, levels, group), levels, group)


@pytest.mark.parametrize(("curved", "groups"), [(False, 1), (True, 1), (True, 3)])
def test_codes_are_those_of_the_obvious_loop(curved, groups):
    """Computed in float64 from the definition `z = W^T E U`, entry after entry."""
    objective, found = begun(curved, groups)
    rows, columns = found.codes.shape
    across = objective.feedback.double() + torch.eye(columns, dtype=torch.float64)
    down = unfactored(objective.rows, objective.rows.feedback) + torch.eye(rows, dtype=torch.float64)
    errors, codes = torch.zeros(rows, columns, dtype=torch.float64), torch.zeros(rows, columns, dtype=torch.long)
    for column, group in enumerate(found.group.tolist()):
        for row in range(rows):
            own = found.levels[row, group].double()
            wanted = (
                objective.target[row, column].double() + down[: row + 1, row] @ errors[: row + 1] @ across[:, column]
            )
            codes[row, column] = (wanted - own).abs().argmin()
            errors[row, column] = objective.target[row, column].double() - own[codes[row, column]]
    assert (codes == found.codes).float().mean() > 0.995  # ties


@pytest.mark.parametrize(("curved", "groups"), [(False, 1), (True, 1), (True, 3)])
def test_moving_a_code_is_to_where_the_objective_is_least(curved, groups):
    objective, found = begun(curved, groups, rows=8, columns=24)
    worth, gram = unfactored(objective.rows, objective.curvature), objective.gram.double()
    error, codes = objective.target.double() - found.values().double(), found.codes.clone()
    for column, group in enumerate(found.group.tolist()):
        for row in range(8):
            own = found.levels[row, group].double()
            moves = own - own[int(codes[row, column])]
            slope = worth[row] @ error @ gram[:, column]
            changes = -2 * moves * slope + worth[row, row] * gram[column, column] * moves.square()
            codes[row, column] = changes.argmin()
            error[row, column] -= moves[changes.argmin()]
    assert (_descended(objective, found) == codes).float().mean() > 0.99


@pytest.mark.parametrize(("curved", "groups"), [(False, 1), (True, 1), (True, 3)])
def test_levels_for_given_codes_are_near_the_solution_of_least_squares(curved, groups):
    objective, found = begun(curved, groups, rows=8, size=4)
    better = Levels(found.codes, _refitted(objective, found), found.group)
    root = torch.linalg.cholesky(
        torch.kron(unfactored(objective.rows, objective.curvature), objective.gram.double())
    ).T
    chosen = torch.zeros(found.codes.numel(), found.levels.numel(), dtype=torch.float64)
    own = found.places + torch.arange(8)[:, None] * found.levels[0].numel()
    chosen[torch.arange(len(chosen)), own.flatten()] = 1
    solved = torch.linalg.lstsq(root @ chosen, (root @ objective.target.double().flatten())[:, None]).solution
    best = Levels(found.codes, solved.float().view_as(found.levels), found.group)
    losses = [objective.loss(each.values()) for each in (best, better, found)]
    assert losses[0] <= losses[1] * 1.0001
    assert losses[1] - losses[0] < 0.05 * (losses[2] - losses[0])


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
    assert ((found.levels == 0).sum(2) >= 1).all()
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


def test_groups_lose_less_than_rows_and_what_outputs_are_worth_is_made_use_of():
    weight, gram = problem(rows=64, columns=128)
    factor, worth = factorize(gram), outputs(64)
    whole = gptq_codebook(weight, weight, gram, factor, 8, torch.float16)
    groups = gptq_codebook(weight, weight, gram, factor, 8, torch.float16, group_size=32)
    assert groups.levels.shape == (64, 4, 8)
    assert loss(weight, groups.values(), gram) < 0.8 * loss(weight, whole.values(), gram)
    stored = QuantizedWeight(groups.codes, groups.levels.half(), None, Grid(3, 32, type="codebook"))
    assert torch.equal(stored.dequantize(), groups.values())
    curved = gptq_codebook(weight, weight, gram, factor, 8, torch.float16, rows=factorize_rows(worth))
    lost = []
    for found in (curved, whole):
        error = (weight - found.values()).double()
        lost.append(((torch.block_diag(*worth).double() @ error @ gram.double()) * error).sum())
    assert lost[0] < 0.9 * lost[1]


def likelihood(weight, importance, means):
    """The weighted mean log-likelihood of a row's weights in the best mixture with these means (EM over the rest)."""
    weight, means = weight.double(), means.double()
    shares, variances = torch.full_like(means, 1 / means.shape[1]), torch.full_like(means, weight.var().item() / 16)
    for _ in range(200):
        logs = shares.log()[:, None] - (weight[:, :, None] - means[:, None]).square() / (2 * variances[:, None])
        logs = logs - variances[:, None].log() / 2
        own = logs.softmax(2) * importance[None, :, None]
        shares = own.sum(1) / importance.sum()
        variances = (own * (weight[:, :, None] - means[:, None]).square()).sum(1) / own.sum(1)
        variances = variances.clamp(min=1e-4)
    return (logs.logsumexp(2) * importance).sum(1) / importance.sum()


def test_a_mixture_is_found_and_is_likelier_than_the_means_it_began_with():
    generator = torch.Generator().manual_seed(9)
    means = torch.tensor([-2.0, 0.0, 3.0])
    drawn = torch.randint(3, (4, 3000), generator=generator)
    weight = means[drawn] + torch.tensor([0.2, 1.0, 0.4])[drawn] * torch.randn(4, 3000, generator=generator)
    importance = torch.ones(3000)
    begun = best_codebooks(weight, importance, 3)
    found = mixture_means(weight, importance, begun)
    assert torch.equal(found, found.sort(1).values)
    assert (found - means).abs().max() < 0.15 < (begun - means).abs().max()
    assert (likelihood(weight, importance, found) > likelihood(weight, importance, begun)).all()
    keep = torch.rand(weight.shape, generator=generator) > 0.5
    held = best_codebooks(weight * keep, importance, 4, keep)
    kept = mixture_means(weight * keep, importance, held, keep)
    assert ((kept == 0).sum(1) == 1).all()
    assert torch.isfinite(mixture_means(torch.zeros(2, 8), torch.zeros(8), torch.zeros(2, 4))).all()


def test_the_objective_is_its_definition():
    objective, found = begun(True, 1)
    error = objective.target.double() - found.values().double()
    wanted = (unfactored(objective.rows, objective.curvature) @ error @ objective.gram.double() * error).sum().item()
    assert objective.loss(found.values()) == pytest.approx(wanted, rel=1e-5)
