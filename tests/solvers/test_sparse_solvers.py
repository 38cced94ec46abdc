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

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gptq import make_problem
from test_two_sided import make_curvature, whole

from hfcompress.kernels.pruning import eliminate
from hfcompress.solvers.alps import alps
from hfcompress.solvers.curvature import factorize_rows, indifferent
from hfcompress.solvers.gptq import factorize
from hfcompress.solvers.pattern import Pattern
from hfcompress.solvers.sparse_fit import SparseFit
from hfcompress.solvers.sparsegpt import sparsegpt


def make_fit(seed=0, out_features=5, in_features=32, pattern="2:4", curved=True, sparsity=0.5):
    weight, gram = make_problem(seed, out_features, in_features)
    factor = factorize(gram, act_order=False)
    rows = factorize_rows([make_curvature(out_features, seed)]) if curved else indifferent(out_features)
    return SparseFit.of(weight, gram, factor, rows, Pattern.parse(pattern, sparsity)), factor


def exact_loss(fit: SparseFit, values=None) -> float:
    """The objective in float64."""
    error = fit.target.double() - (fit.values if values is None else values).double()
    ordered = whole(fit.rows)[fit.rows.order][:, fit.rows.order]
    return ((fit.gram.double() @ error @ ordered) * error).sum().item()


def exact_refit(fit: SparseFit) -> torch.Tensor:
    """Masked least squares, all entries of all rows as one float64 system."""
    ordered = whole(fit.rows)[fit.rows.order][:, fit.rows.order]
    metric = torch.kron(fit.gram.double(), ordered)
    keep, target = fit.keep.flatten(), fit.target.double().flatten()
    values = torch.zeros_like(target)
    values[keep] = torch.linalg.solve(metric[keep][:, keep], (metric @ target)[keep])
    return values.view_as(fit.target)


@pytest.mark.parametrize("curved", [False, True])
def test_the_refit_is_masked_least_squares(curved):
    fit, _ = make_fit(curved=curved)
    fit.take(fit.pattern.mask(fit.target.T.abs()[fit.rows.order.argsort()]))
    before = exact_loss(fit)
    fit.refit(steps=400, tolerance=1e-6)
    assert torch.allclose(fit.values.double(), exact_refit(fit), atol=2e-3)
    assert exact_loss(fit) < 0.9 * before
    assert torch.equal(fit.values != 0, fit.keep)
    assert fit.loss() == pytest.approx(exact_loss(fit), rel=1e-3)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 2))
def test_of_four_the_best_two_are_removed(seed, count):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(6, 4))
    form = root.T @ root
    values, inverse = rng.normal(size=4), np.linalg.inv(form)
    costs = {}
    for gone in itertools.combinations(range(4), count):
        some = list(gone)
        costs[gone] = values[some] @ np.linalg.inv(inverse[some][:, some]) @ values[some]
    left, removed = values.astype(np.float32), np.zeros(4, bool)
    room = [np.empty(4, np.float32), np.empty(4, np.float32), np.empty((4, 4), np.float32), np.empty(4, bool)]
    cost = eliminate(left, inverse.astype(np.float32), removed, count, *room)
    assert cost == pytest.approx(min(costs.values()), rel=1e-2, abs=1e-5)
    some, rest = np.flatnonzero(removed), np.flatnonzero(~removed)
    best = values[rest] + np.linalg.solve(form[rest][:, rest], form[rest][:, some] @ values[some])
    assert np.allclose(left[rest], best, rtol=2e-2, atol=1e-3)
    assert not left[some].any()


def obvious_sparsegpt(fit: SparseFit) -> torch.Tensor:
    """
    Group after group, the two of four entries whose removal costs least when all columns after them make up for it, in
    float64 on the Kronecker product; what stays of a group is then left as it has become.
    """
    ordered = whole(fit.rows)[fit.rows.order][:, fit.rows.order]
    columns, rows = fit.target.shape
    metric, target = torch.kron(fit.gram.double(), ordered), fit.target.double().flatten()
    fixed, values = torch.zeros(target.shape, dtype=torch.bool), target.clone()

    def settled(zero):
        """The rest at its best, with what is fixed and `zero` held."""
        held = fixed.clone()
        held[zero] = True
        trial = values.clone()
        trial[zero] = 0
        free = ~held
        off = metric[free][:, held] @ (target - trial)[held]
        trial[free] = target[free] + torch.linalg.solve(metric[free][:, free], off)
        return trial, (metric @ (target - trial)) @ (target - trial)

    for start in range(0, columns, 4):
        for row in range(rows):
            own = [(start + j) * rows + row for j in range(4)]
            trials = [settled(list(pair)) for pair in itertools.combinations(own, 2)]
            best, _ = min(trials, key=lambda each: each[1].item())
            values = best
            fixed[own] = True
    return values.view_as(fit.target)


def test_sparsegpt_is_the_obvious_sweep_for_one_row():
    fit, factor = make_fit(out_features=1, in_features=16, curved=False)
    values, keep = sparsegpt(fit.target, factor, fit.rows, fit.pattern)
    expected = obvious_sparsegpt(fit)
    assert torch.equal(keep, expected != 0)
    assert torch.allclose(values.double(), expected, atol=1e-3)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "unstructured", "2x4"])
@pytest.mark.parametrize("curved", [False, True])
def test_every_solver_beats_magnitude_and_holds_the_pattern(pattern, curved):
    fit, factor = make_fit(out_features=8, in_features=160, pattern=pattern, curved=curved)
    fit.take(fit.pattern.mask(fit.target.T.abs()[fit.rows.order.argsort()]))
    fit.refit(200, 1e-5)
    magnitude = exact_loss(fit)
    found = {}
    for name in ("sparsegpt", "alps"):
        if name == "alps":
            fit.values, fit.keep = alps(fit.target, fit.gram, fit.rows, fit.pattern)
        else:
            fit.values, fit.keep = sparsegpt(fit.target, factor, fit.rows, fit.pattern)
        assert torch.equal(fit.values, fit.values * fit.keep)
        fit.refit(200, 1e-5)
        found[name] = exact_loss(fit)
        assert found[name] < magnitude
        assert fit.pattern.holds(fit.unordered(torch.device("cpu"))[0])
    assert found["alps"] < 1.05 * found["sparsegpt"]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.sampled_from(["2:4", "4:8", "1:4"]), st.booleans())
def test_groups_chosen_anew_only_ever_help(seed, pattern, curved):
    fit, factor = make_fit(seed, 6, 32, pattern, curved)
    fit.values, fit.keep = sparsegpt(fit.target, factor, fit.rows, fit.pattern)
    losses = [exact_loss(fit)]
    for _ in range(3):
        fit.descend()
        losses.append(exact_loss(fit))
        assert fit.pattern.holds(fit.values.T)
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(losses))


def test_where_no_group_gains_anything_none_does():
    fit, factor = make_fit(3, 2, 16, "2:4")
    fit.values, fit.keep = sparsegpt(fit.target, factor, fit.rows, fit.pattern)
    for _ in range(100):
        fit.descend()
    least = exact_loss(fit)
    for row, start in itertools.product(range(2), range(0, 16, 4)):
        own = slice(start, start + 4)
        for pair in itertools.combinations(range(4), 2):
            trial = fit.values.double().clone()
            trial[own, row] = 0
            ordered = whole(fit.rows)[fit.rows.order][:, fit.rows.order]
            slopes = (fit.gram.double() @ (fit.target.double() - trial) @ ordered)[own, row][list(pair)]
            form = ordered[row, row] * fit.gram.double()[own, own][list(pair)][:, list(pair)]
            trial[[start + j for j in pair], row] = torch.linalg.solve(form, slopes)
            assert exact_loss(fit, trial) >= least * (1 - 1e-5)


def test_alps_comes_near_the_best_of_all_masks():
    fit, _ = make_fit(5, 1, 12, "2:4", curved=False)
    best = np.inf
    for groups in itertools.product(itertools.combinations(range(4), 2), repeat=3):
        fit.keep = torch.zeros_like(fit.keep)
        for number, pair in enumerate(groups):
            fit.keep[[4 * number + j for j in pair]] = True
        best = min(best, exact_loss(fit, exact_refit(fit)))
    fit.values, fit.keep = alps(fit.target, fit.gram, fit.rows, fit.pattern)
    fit.refine(4)
    assert exact_loss(fit, exact_refit(fit)) < 1.1 * best


def test_a_column_that_no_token_excites_keeps_the_pattern_and_finite_values():
    weight, gram = make_problem(0, 4, 16)
    gram[3] = gram[:, 3] = 0
    factor = factorize(gram, act_order=False)
    fit = SparseFit.of(weight, gram, factor, indifferent(4), Pattern.parse("2:4"))
    fit.values, fit.keep = sparsegpt(fit.target, factor, fit.rows, fit.pattern)
    fit.refine(2)
    fit.refit()
    assert torch.isfinite(fit.values).all()
    assert fit.pattern.holds(fit.values.T)
