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
"""Means of clusters: against the definition, from either start, and where there are fewer points than means."""

import pytest
import torch

from hfcompress.solvers import k_means as module
from hfcompress.solvers.k_means import STARTS, k_means, nearest


ENTRIES = 256


def problem(points: int = 8000, length: int = 4):
    """Points and what errors there cost."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(points, 1, generator=generator).exp()
    return sizes * torch.randn(points, length, generator=generator), torch.rand(
        points, length, generator=generator
    ) + 0.1


@pytest.mark.parametrize("start", STARTS)
def test_means_lose_less_than_what_is_drawn_and_are_means(start):
    points, weights = (each.double() for each in problem())

    def lost(vectors):
        each = (weights[:, None] * (points[:, None] - vectors.double()).square()).sum(2).min(1)
        return each.values.sum().item(), each.indices

    found = k_means(points.float(), weights.float(), ENTRIES, 0, start)
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


def test_clusters_that_lie_apart_are_all_found():
    """What points drawn at random miss, and splits: many small clusters beside a large one."""
    generator = torch.Generator().manual_seed(1)
    centres = 100 * torch.randn(32, 3, generator=generator)
    own = torch.cat([torch.zeros(20000, dtype=torch.int64), torch.arange(32).repeat(20)])
    points = centres[own] + 0.1 * torch.randn(len(own), 3, generator=generator)
    costs = torch.ones_like(points)
    found = k_means(points, costs, 32, 0)
    assert nearest(points, costs, found)[0].max() < 9
    assert torch.equal(found, k_means(points, costs, 32, 0))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("different", [1, 5, 40])
def test_fewer_points_than_means_are_all_met(start, different):
    points = torch.randn(different, 2, generator=torch.Generator().manual_seed(2)).repeat(3, 1)
    costs = torch.ones_like(points)
    found = k_means(points, costs, 64, 0, start)
    assert found.shape == (64, 2)
    assert torch.isfinite(found).all()
    assert nearest(points, costs, found)[0].max() < 1e-4


def test_the_nearest_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(module, "ROOM", 1000)  # some points at a time
    points, costs = problem(points=301)
    vectors = points[:50] + 0.1
    errors, numbers = nearest(points, costs, vectors)
    wanted = (costs[:, None].double() * (points[:, None].double() - vectors.double()).square()).sum(2).min(1)
    assert torch.equal(numbers, wanted.indices)
    torch.testing.assert_close(errors, wanted.values.float(), atol=1e-4, rtol=1e-4)
