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

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gptq import make_problem
from test_two_sided import make_curvature

from hfcompress.solvers.columns import remove_columns


def problem(seed, out_features, in_features):
    weight, gram = make_problem(seed, out_features, in_features)
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(in_features)
    return weight, gram


def loss(weight, gram, stays, values, curvature=None) -> float:
    found = torch.zeros_like(weight, dtype=torch.float64)
    found[:, stays] = values.double()
    error = weight.double() - found
    curved = error if curvature is None else curvature.double() @ error
    return ((curved @ gram.double()) * error).sum().item()


def least_squares(weight, gram, stays) -> torch.Tensor:
    """`W' = W H[:, k] (H_kk)^-1` in float64."""
    h = gram.double()
    return torch.linalg.solve(h[stays][:, stays], (weight.double() @ h[:, stays]).T).T


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.sampled_from([1, 2, 4]), st.integers(1, 7))
def test_what_stays_is_the_least_squares_solution(seed, size, keep):
    weight, gram = problem(seed, 5, 8 * size)
    units = torch.arange(8 * size) // size
    stays, values = remove_columns(weight, gram, units, keep)
    assert len(stays) == keep * size
    assert torch.equal(stays, stays.sort().values)
    assert (torch.bincount(units[stays], minlength=8) % size == 0).all()
    assert torch.allclose(values.double(), least_squares(weight, gram, stays), atol=2e-3)


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_close_to_the_best_of_all(seed, curved):
    weight, gram = problem(seed, 6, 10)
    curvature = make_curvature(6, seed) if curved else None
    root = None
    if curvature is not None:
        values, vectors = torch.linalg.eigh(curvature)
        root = (vectors * values.clamp(min=0).sqrt()).T
    stays, values = remove_columns(weight, gram, torch.arange(10), 6, root)
    found = loss(weight, gram, stays, values, curvature)
    every = [torch.tensor(some) for some in itertools.combinations(range(10), 6)]
    losses = [loss(weight, gram, some, least_squares(weight, gram, some), curvature) for some in every]
    assert min(losses) * (1 - 1e-3) <= found <= 1.25 * min(losses)
    assert found < sorted(losses)[len(losses) // 20]


def test_units_may_lie_anywhere():
    weight, gram = problem(3, 4, 12)
    scattered = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    order = torch.argsort(scattered, stable=True)
    stays, values = remove_columns(weight, gram, scattered, 2)
    sorted_stays, _ = remove_columns(weight[:, order], gram[order][:, order], scattered[order], 2)
    assert torch.equal(order[sorted_stays].sort().values, stays)
    assert torch.allclose(values.double(), least_squares(weight, gram, stays), atol=2e-3)


def test_nothing_to_remove_changes_nothing():
    weight, gram = problem(1, 4, 6)
    stays, values = remove_columns(weight, gram, torch.arange(6), 6)
    assert torch.equal(values, weight)
    assert torch.equal(stays, torch.arange(6))
