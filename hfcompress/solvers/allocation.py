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
"""Which choice each unit gets, so that the summed loss is least within a budget: a multiple-choice knapsack.

For a price `p` per byte, the best choices are those of least `loss + p * size`, unit by unit; they are optimal for the
bytes that they take (Everett 1963), and as `p` falls they run through the vertices of the lower convex hull of all
(size, loss). The hull is the sum of the units' own hulls, so its steps are theirs sorted by what they gain per byte, and
no price has to be searched for. Between two vertices the hull bounds what any choice could reach.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


SWAPS = 1000  # a guard: every swap lowers the loss, and some ten are usual
PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Frontier:
    """
    The vertices of the lower convex hull of all (summed size, summed loss), smallest first.

    Args:
        choices (`Tensor`): int64 `(vertices, units)`.
        sizes (`Tensor`): float64 `(vertices,)`.
        losses (`Tensor`): float64 `(vertices,)`, falling.
    """

    choices: Tensor
    sizes: Tensor
    losses: Tensor

    def bound(self, budget: float) -> float:
        """The loss that no choice within the budget can go below; infinite where the least does not fit."""
        inside = int((self.sizes <= budget).sum())
        if not inside:
            return float("inf")
        if inside == len(self.sizes):
            return self.losses[-1].item()
        share = (budget - self.sizes[inside - 1]) / (self.sizes[inside] - self.sizes[inside - 1])
        return torch.lerp(self.losses[inside - 1], self.losses[inside], share).item()


def frontier(losses: Tensor, sizes: Tensor) -> Frontier:
    """
    Args:
        losses (`Tensor`): `(units, choices)`; infinite where a unit does not have a choice.
        sizes (`Tensor`): `(units, choices)`, likewise.
    """
    losses, sizes = _absent_marked(losses, sizes)
    hulls = [
        _hull(own_losses.tolist(), own_sizes.tolist()) for own_losses, own_sizes in zip(losses, sizes, strict=True)
    ]
    steps = []
    for unit, hull in enumerate(hulls):
        for before, after in itertools.pairwise(hull):
            gain = (losses[unit, before] - losses[unit, after]) / (sizes[unit, after] - sizes[unit, before])
            steps.append((-gain.item(), unit, after))
    chosen = [hull[0] for hull in hulls]
    vertices = [list(chosen)]
    for _, unit, after in sorted(steps, key=lambda step: step[0]):  # stable: a unit's own steps stay in their order
        chosen[unit] = after
        vertices.append(list(chosen))
    choices = torch.tensor(vertices).view(len(vertices), len(hulls))
    return Frontier(choices, _total(sizes, choices), _total(losses, choices))


def allocate(losses: Tensor, sizes: Tensor, budget: float) -> Tensor | None:
    """
    The vertex of the hull that fits, its slack filled by the steps that gain most per byte, then by swaps.

    Args:
        losses (`Tensor`): `(units, choices)`; infinite where a unit does not have a choice.
        sizes (`Tensor`): `(units, choices)`, likewise.
        budget (`float`): what the sizes may sum up to.

    Returns:
        `Tensor` or `None`: int64 `(units,)`, the choice of each unit; `None` where not even the least fits. Its loss is
        above the optimum by no more than one step of the hull gains.
    """
    losses, sizes = _absent_marked(losses, sizes)
    hull = frontier(losses, sizes)
    inside = int((hull.sizes <= budget).sum())
    if not inside:
        return None
    chosen = hull.choices[inside - 1].clone()
    _fill(losses, sizes, budget, chosen)
    for _ in range(SWAPS):
        if not _swap(losses, sizes, budget, chosen):
            break
    return chosen


def _absent_marked(losses: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """In float64; a choice that a unit does not have has an infinite loss and no size, so that differences are numbers."""
    absent = torch.isinf(losses) | torch.isinf(sizes)
    return torch.where(absent, float("inf"), losses.double()), torch.where(absent, 0.0, sizes.double())


def _hull(losses: list[float], sizes: list[float]) -> list[int]:
    """One unit's choices on its lower convex hull, smallest first, each of less loss than the one before."""
    hull: list[int] = []
    for choice in sorted(range(len(sizes)), key=lambda c: (sizes[c], losses[c])):
        if losses[choice] == float("inf") or (hull and losses[choice] >= losses[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            gained = (losses[a] - losses[b]) * (sizes[choice] - sizes[b])
            if gained > (losses[b] - losses[choice]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        if hull and sizes[hull[-1]] == sizes[choice]:
            hull.pop()
        hull.append(choice)
    return hull


def _total(values: Tensor, choices: Tensor) -> Tensor:
    """The sums of the chosen values: `(units, choices)` by int64 `(n, units)` to `(n,)`."""
    return values.gather(1, choices.T).sum(0)


def _changes(values: Tensor, chosen: Tensor) -> Tensor:
    """What every choice would change: `(units, choices)`."""
    return values - values.gather(1, chosen[:, None])


def _fill(losses: Tensor, sizes: Tensor, budget: float, chosen: Tensor) -> None:
    """While one unit can be made better within the budget, the one that gains most per byte is."""
    while True:
        slack = budget - _total(sizes, chosen[None]).item()
        gain, cost = -_changes(losses, chosen), _changes(sizes, chosen)
        rate = torch.where((gain > 0) & (cost <= slack), gain / cost.clamp(min=1e-300), -1.0)
        best = int(rate.argmax())
        if rate.view(-1)[best] <= 0:
            return
        unit, choice = divmod(best, losses.shape[1])
        chosen[unit] = choice


def _swap(losses: Tensor, sizes: Tensor, budget: float, chosen: Tensor) -> bool:
    """Change the two units that together lower the loss most within the budget; whether there are such."""
    slack = budget - _total(sizes, chosen[None]).item()
    units, choices = losses.shape
    change, cost = _changes(losses, chosen).view(-1), _changes(sizes, chosen).view(-1)
    unit_of = torch.arange(units).repeat_interleave(choices)
    best = (-1e-12 * max(_total(losses, chosen[None]).item(), 1e-300), -1, -1)
    for rows in torch.arange(len(change)).split(max(1, PAIRS_AT_ONCE // len(change))):
        together = change[rows, None] + change
        allowed = (cost[rows, None] + cost <= slack) & (unit_of[rows, None] != unit_of)
        together = torch.where(allowed, together, float("inf"))
        at = int(together.argmin())
        if together.view(-1)[at] < best[0]:
            row, other = divmod(at, len(change))
            best = (together.view(-1)[at].item(), int(rows[row]), other)
    for flat in best[1:]:
        if flat >= 0:
            chosen[flat // choices] = flat % choices
    return best[1] >= 0
