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
"""The allocation against every choice there is, and against what cannot be beaten."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.solvers.allocation import allocate, frontier


def best_of_all(losses: np.ndarray, sizes: np.ndarray, budget: float) -> float:
    """The least loss within the budget, by trying everything."""
    best = math.inf
    for picked in itertools.product(range(losses.shape[1]), repeat=len(losses)):
        units = range(len(losses))
        if sizes[units, picked].sum() <= budget:
            best = min(best, losses[units, picked].sum())
    return best


def table_of(losses: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    """The same by dynamic programming over whole bytes."""
    best = np.zeros(budget + 1)
    for own_losses, own_sizes in zip(losses, sizes, strict=True):
        following = np.full(budget + 1, math.inf)
        for loss, size in zip(own_losses, own_sizes, strict=True):
            if size <= budget and loss < math.inf:
                following[size:] = np.minimum(following[size:], best[: budget + 1 - size] + loss)
        best = following
    return best[budget]


@st.composite
def problems(draw):
    units, choices = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    losses = draw(st.lists(st.integers(0, 50) | st.just(math.inf), min_size=units * choices, max_size=units * choices))
    sizes = draw(st.lists(st.integers(1, 20), min_size=units * choices, max_size=units * choices))
    losses, sizes = np.array(losses, float).reshape(units, choices), np.array(sizes).reshape(units, choices)
    losses[:, 0] = np.where(np.isinf(losses).all(1), 60, losses[:, 0])  # every unit has a choice
    return losses, sizes, draw(st.integers(1, 20 * units))


def totals(losses, sizes, chosen):
    units = range(len(losses))
    return losses[units, chosen].sum(), sizes[units, chosen].sum()


@given(problems())
@settings(max_examples=200, deadline=None)
def test_within_the_budget_and_between_the_bound_and_the_best_vertex(problem):
    losses, sizes, budget = problem
    exact = best_of_all(losses, sizes, budget)
    assert table_of(losses, sizes, budget) == exact
    as_tensors = torch.tensor(losses), torch.tensor(sizes)
    chosen, hull = allocate(*as_tensors, budget), frontier(*as_tensors)
    if chosen is None:
        assert exact == math.inf
        return
    loss, size = totals(losses, sizes, chosen)
    assert size <= budget
    assert hull.bound(budget) - 1e-9 <= exact <= loss
    steps = -np.diff(hull.losses.numpy())
    assert loss - exact <= max(steps, default=0) + 1e-9
    assert loss <= hull.losses[hull.sizes <= budget].min() + 1e-9


@given(problems(), st.floats(0, 30))
@settings(max_examples=100, deadline=None)
def test_no_choice_is_below_the_hull_at_any_price(problem, price):
    losses, sizes, _ = problem
    hull = frontier(torch.tensor(losses), torch.tensor(sizes))
    assert (hull.losses.diff() <= 0).all()
    assert (hull.sizes.diff() >= 0).all()
    least = (losses + price * sizes).min(1).sum()
    assert (hull.losses + price * hull.sizes).min().item() == pytest.approx(least)


def test_it_comes_close_to_the_optimum_of_a_model_sized_problem():
    """Sixty units, each falling by about a factor of four per bit, on whole blocks of bytes."""
    random = np.random.default_rng(0)
    bits = np.array([2.5, 2.25, 3.25, 3.125, 4.25, 4.125, 8.125])
    width = random.choice([64, 128, 384], 60)
    sizes = (width[:, None] * bits * 8).astype(int)
    losses = random.lognormal(0, 1.5, (60, 1)) * 4.0**-bits * random.lognormal(0, 0.1, (60, 7))
    tensors = torch.tensor(losses), torch.tensor(sizes)
    for average in (2.4, 3.1, 4.0, 6.0):
        budget = int(width.sum() * 8 * average)
        chosen = allocate(*tensors, budget)
        loss, size = totals(losses, sizes, chosen)
        assert 0.999 * budget < size <= budget
        assert loss <= 1.002 * table_of(losses, sizes, budget)


def test_size_and_loss_can_change_places():
    losses, sizes = torch.tensor([[8.0, 2.0, 1.0], [4.0, 1.0, math.inf]]), torch.tensor([[1, 2, 8], [1, 3, 9]])
    assert allocate(sizes, losses, 3.0).tolist() == [1, 1]
    assert allocate(sizes, losses, 12.0).tolist() == [0, 0]
    assert allocate(sizes, losses, 1.9) is None


def test_what_does_not_fit_is_said():
    losses, sizes = torch.tensor([[1.0, 2.0]]), torch.tensor([[5, 4]])
    assert allocate(losses, sizes, 3) is None
    assert frontier(losses, sizes).bound(3) == math.inf
    assert allocate(losses, sizes, 4).tolist() == [1]
    assert allocate(losses, sizes, 1e9).tolist() == [0]


def test_swaps_find_what_no_single_step_does():
    """The hull's vertex leaves slack that only giving up one step for another can use."""
    losses, sizes = torch.tensor([[10.0, 4.0], [10.0, 3.0]]), torch.tensor([[0, 2], [0, 3]])
    assert allocate(losses, sizes, 3).tolist() == [0, 1]
