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
Scalar codebooks: every row, or every group of neighbours in a row, has levels of its own, wherever they are best, and its
weights are numbers of levels.

The levels begin as those of least `sum_j D_j (w_j - l)^2`, `D` being what an error in each column costs once the columns
after it have made up for it (weighted k-means in one dimension, exact: SqueezeLLM, arXiv 2306.07629, takes the diagonal of a
Hessian), or as the means of a mixture of Gaussians. Then codes are swept as in GPTQ, or in
[`hfcompress.solvers.two_sided`] where it is known what the outputs are worth. With the codes held the levels enter
`tr(C (V - Q) H (V - Q)^T)` quadratically and are improved by conjugate gradients (LNQ in GuidedQuant, arXiv 2505.07004,
alternates likewise), and with the levels held codes are moved one by one to where it is least; both in turn, and what is best
for rows that depend on one another stays.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfcompress.solvers.conjugate import conjugate_gradients
from hfcompress.solvers.curvature import RowFactor
from hfcompress.solvers.gptq import Factor
from hfcompress.solvers.objective import Objective, blocks, run_kernel


HEAVY = 1e3  # times the most important column
CG_STEPS = 8
DESCENTS = 2  # of all codes, in every round


@dataclass(frozen=True)
class Levels:
    """
    A weight on codebooks.

    Args:
        codes (`Tensor`): uint8 `(out_features, in_features)`.
        levels (`Tensor`): float32 `(out_features, groups, size)`, ascending.
        group (`Tensor`): int64 `(in_features,)`: the group of every column.
    """

    codes: Tensor
    levels: Tensor
    group: Tensor

    @property
    def places(self) -> Tensor:
        """Where the level of each weight is among those of its row: int64 `(out_features, in_features)`."""
        return self.codes + self.group * self.levels.shape[2]

    def values(self) -> Tensor:
        """float32 `(out_features, in_features)`."""
        return self.levels.flatten(1).gather(1, self.places)


def best_codebooks(weight: Tensor, importance: Tensor, size: int, keep: Tensor | None = None) -> Tensor:
    """
    The levels of least weighted squared error.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32.
        importance (`Tensor`): `(in_features,)`: of the columns.
        size (`int`): levels per row.
        keep (`Tensor`, *optional*): bool like the weight: the others are zero, and so is one level.

    Returns:
        `Tensor`: float32 `(out_features, size)`, each row ascending.
    """
    from hfcompress.kernels.codebooks import best_levels

    ascending, order = weight.sort(1)
    weights = importance[order]
    if keep is not None:  # zeros weigh so much that the level which is theirs is as good as zero
        stays = keep.cpu().gather(1, order)
        weights = torch.where(stays, weights, HEAVY * weights.max())
    levels = torch.empty(len(weight), size)
    best_levels(ascending.numpy(), weights.contiguous().numpy(), levels.numpy())
    if keep is not None:
        levels.scatter_(1, levels.abs().argmin(1, keepdim=True), 0.0)
    return levels


def gptq_codebook(
    weight: Tensor,
    target: Tensor,
    gram: Tensor,
    factor: Factor,
    size: int,
    dtype: torch.dtype,
    rounds: int = 3,
    keep: Tensor | None = None,
    rows: RowFactor | None = None,
    group_size: int = -1,
    mixture: bool = False,
) -> Levels:
    """
    Codes and levels so that `tr(C (V - Q) H (V - Q)^T)` is small, `V` being the target.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32, whose levels are begun with.
        target (`Tensor`): likewise: what should be met.
        gram (`Tensor`): `H`, `(in_features, in_features)` float32.
        factor (`Factor`): of the Gram matrix.
        size (`int`): levels per row, or group.
        dtype (`torch.dtype`): what levels are stored in.
        rounds (`int`, *optional*, defaults to 3): times that levels and codes are improved in turn.
        keep (`Tensor`, *optional*): bool like the weight: the others are zero, and remain so.
        rows (`RowFactor`, *optional*): of the outputs, if they are not all worth the same.
        group_size (`int`, *optional*, defaults to -1): weights of a row that share levels; -1 for all.
        mixture (`bool`, *optional*, defaults to `False`): begin with the means of a mixture of Gaussians; see
            [`hfcompress.solvers.mixture`].
    """
    device, columns = weight.device, weight.shape[1]
    objective = Objective.of(target, gram, factor, rows, keep)
    width = columns if group_size == -1 else group_size
    begun = _first_levels(weight.cpu(), factor.importance.cpu(), size, keep, width, mixture)
    levels = stored(begun, dtype)[objective.rows.order]
    group = objective.order // width
    found = best = Levels(_swept(objective, levels, group), levels, group)
    least = objective.losses(best.values())
    for _ in range(rounds):
        found = _ascending(replace(found, levels=stored(_refitted(objective, found), dtype)))
        for _ in range(DESCENTS):
            found = replace(found, codes=_descended(objective, found))
        losses = objective.losses(found.values())
        better = losses < least
        if not better.any():
            break
        codes = torch.where(better[:, None], found.codes, best.codes)
        best = Levels(codes, torch.where(better[:, None, None], found.levels, best.levels), group)
        least = torch.minimum(losses, least)
    codes = torch.empty_like(best.codes)
    codes[:, objective.order] = objective.rows_unordered(best.codes)
    levels = objective.rows_unordered(best.levels)
    return Levels(codes.to(device), levels.to(device), torch.arange(columns, device=device) // width)


def _first_levels(
    weight: Tensor, importance: Tensor, size: int, keep: Tensor | None, width: int, mixture: bool
) -> Tensor:
    """The levels that are begun with: float32 `(out_features, groups, size)`."""
    found = []
    for start in range(0, weight.shape[1], width):
        part = slice(start, start + width)
        stays = None if keep is None else keep.cpu()[:, part]
        own = (weight[:, part], importance[part])
        levels = best_codebooks(*own, size, stays)
        if mixture:
            from hfcompress.solvers.mixture import mixture_means

            levels = mixture_means(*own, levels, stays)
        found.append(levels)
    return torch.stack(found, 1)


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as they are once they have been stored: float32."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype).float()


def _ascending(found: Levels) -> Levels:
    """The same values, the levels sorted."""
    levels, order = found.levels.sort(2)
    ranks = order.argsort(2).to(torch.uint8)
    return replace(found, codes=ranks.flatten(1).gather(1, found.places), levels=levels)


def _swept(objective: Objective, levels: Tensor, group: Tensor) -> Tensor:
    """The codes, column after column and row after row: uint8 `(out_features, in_features)`."""
    from hfcompress.kernels.codebooks import round_levels

    target, feedback, rows = objective.target, objective.feedback, objective.rows
    carried, codes = torch.zeros_like(target), torch.empty(target.shape, dtype=torch.uint8)
    for part in blocks(target.shape[1]):
        fed = carried[:, : part.start] @ feedback[: part.start, part]
        found = (torch.empty_like(fed, dtype=torch.uint8), torch.empty_like(fed))
        own = (fed, target[:, part], levels, group[part], feedback[part, part].T)
        run_kernel(round_levels, *own, rows.feedback, rows.starts, rows.stops, objective.keep[:, part], written=found)
        codes[:, part], carried[:, part] = found
    return codes


def _descended(objective: Objective, found: Levels) -> Tensor:
    """The codes once each has been moved to its best value, one after the other."""
    from hfcompress.kernels.codebooks import descend_levels

    gram, rows, curvature = objective.gram, objective.rows, objective.curvature
    slopes = objective.slopes(objective.target - found.values())
    moved, codes = torch.zeros_like(slopes), found.codes.clone()
    for part in blocks(slopes.shape[1]):
        own = slopes[:, part] - moved[:, : part.start] @ gram[: part.start, part]
        changed = (codes[:, part].contiguous(), torch.zeros_like(own))
        held = (own, found.levels, found.group[part], gram[part, part], curvature)
        run_kernel(descend_levels, *held, rows.starts, rows.stops, objective.keep[:, part], written=changed)
        codes[:, part], moved[:, part] = changed
    return codes


def _refitted(objective: Objective, found: Levels) -> Tensor:
    """
    Better levels for the codes: a few steps of conjugate gradients from those at hand. Where some weights are zero, the level
    that is zero remains so.
    """
    places, shape = found.places, found.levels.shape
    fixed = found.levels.flatten(1) == 0

    def gathered(each: Tensor) -> Tensor:
        """Sums over all weights at a level."""
        total = torch.zeros(shape[0], shape[1] * shape[2]).scatter_add_(1, places, each)
        return total.masked_fill_(fixed, 0.0) if objective.sparse else total

    def curved(levels: Tensor) -> Tensor:
        return gathered(objective.slopes(levels.gather(1, places)))

    diagonal = gathered(objective.worth[:, None] * objective.gram.diagonal())
    diagonal.clamp_(min=1e-6 * diagonal.mean().item() + 1e-30)
    residual = gathered(objective.slopes(objective.target - found.values()))

    def totals(each: Tensor) -> Tensor:
        return objective.rows.totals(each.T)[:, None]

    step = conjugate_gradients(residual, diagonal, curved, totals, CG_STEPS).view(shape)
    return torch.where(torch.isfinite(step), found.levels + step, found.levels)
