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
"""
Vectors of small weighted squared error to points: Lloyd's rounds (LBG: Linde, Buzo and Gray 1980) from points that are drawn far
from one another (k-means++: Arthur and Vassilvitskii 2007), or from one vector that is split in two again and again.
"""

from collections.abc import Callable

import torch
from torch import Tensor


ROUNDS = 20
ROUNDS_OF_SPLITS = 5  # between one doubling and the next
DRAWS = 256  # in which all points are drawn that are begun with
APART = 0.1  # standard deviations that the halves of a vector lie from it
ROOM = 1 << 24  # distances that are held at a time


def k_means(points: Tensor, costs: Tensor, entries: int, seed: int, start: str = "k-means++") -> Tensor:
    """
    Vectors of small weighted squared error to points. One that nothing is nearest to takes the place of what is worst off.

    Args:
        points (`Tensor`): float32 `(points, length)`.
        costs (`Tensor`): float32 `(points, length)`: of a squared error there.
        entries (`int`): vectors.
        seed (`int`): of the points that are drawn.
        start (`str`, *optional*, defaults to `"k-means++"`): begin with points that are drawn with a probability proportional to
            their error so far, or, `"split"`, with their mean, which is split until there are enough.

    Returns:
        `Tensor`: float32 `(entries, length)`.
    """
    generator = torch.Generator().manual_seed(seed)
    return _improved(points, costs, STARTS[start](points, costs, entries, generator), ROUNDS)


def nearest(points: Tensor, costs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """
    For each point the least weighted squared error, float32, and the number of the vector that has it, int64. See [`k_means`] for
    the arguments.
    """
    errors, numbers = torch.empty(len(points)), torch.empty(len(points), dtype=torch.int64)
    squares, weighted = vectors.square().T, costs * points
    for part in torch.arange(len(points)).split(max(ROOM // len(vectors), 1)):
        distances = costs[part] @ squares
        distances.addmm_(weighted[part], vectors.T, alpha=-2)
        torch.min(distances, 1, out=(errors[part[0] : part[-1] + 1], numbers[part[0] : part[-1] + 1]))
    return (errors + (weighted * points).sum(1)).clamp_(min=0), numbers


def _improved(points: Tensor, costs: Tensor, vectors: Tensor, rounds: int) -> Tensor:
    """Each vector moved to the mean of the points that it is nearest to, so many times."""
    vectors = vectors.clone()
    for _ in range(rounds):
        errors, numbers = nearest(points, costs, vectors)
        sums, totals = _gathered(numbers, costs * points, vectors), _gathered(numbers, costs, vectors)
        used = torch.bincount(numbers, minlength=len(vectors)) > 0
        vectors[used] = sums[used] / totals[used].clamp(min=1e-30)
        if not used.all():
            worst = errors.topk(min(int((~used).sum()), len(points))).indices
            vectors[(~used).nonzero().flatten()[: len(worst)]] = points[worst]
    return vectors


def _gathered(numbers: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """Sums over the points of each vector: like the vectors."""
    length = vectors.shape[1]
    places = numbers[:, None] * length + torch.arange(length)
    total = torch.zeros(vectors.numel())
    return total.scatter_add_(0, places.flatten(), values.flatten()).view_as(vectors)  # far faster than index_add_


def _spread(points: Tensor, costs: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """Points drawn with a probability proportional to their errors, some at a time where there are many."""
    chosen = torch.randint(len(points), (1,), generator=generator)
    errors, _ = nearest(points, costs, points[chosen])
    while len(chosen) < entries:
        more = min(-(-entries // DRAWS), entries - len(chosen))
        left = errors if int((errors > 0).sum()) >= more else torch.ones_like(errors)  # all are met, or as good as
        shares = (left.double() / left.sum(dtype=torch.float64)).cumsum(0)
        drawn = torch.searchsorted(shares, torch.rand(more, generator=generator, dtype=torch.float64))
        drawn.clamp_(max=len(points) - 1)
        chosen = torch.cat([chosen, drawn])
        errors = torch.minimum(errors, nearest(points, costs, points[drawn])[0])
    return points[chosen]


def _split(points: Tensor, costs: Tensor, entries: int, _: torch.Generator) -> Tensor:
    """The mean, split and improved until there are enough: those of the largest errors first, if not all are split at last."""
    vectors = ((costs * points).sum(0) / costs.sum(0))[None]
    while len(vectors) < entries:
        errors, numbers = nearest(points, costs, vectors)
        own = torch.zeros(len(vectors)).scatter_add_(0, numbers, errors)
        halved = own.topk(min(len(vectors), entries - len(vectors))).indices
        deviations = _gathered(numbers, costs * (points - vectors[numbers]).square(), vectors)
        apart = APART * (deviations / _gathered(numbers, costs, vectors).clamp(min=1e-30)).sqrt()[halved]
        vectors = torch.cat([vectors, vectors[halved] + apart])
        vectors[halved] -= apart
        vectors = _improved(points, costs, vectors, ROUNDS_OF_SPLITS)
    return vectors


STARTS: dict[str, Callable[[Tensor, Tensor, int, torch.Generator], Tensor]] = {"k-means++": _spread, "split": _split}
