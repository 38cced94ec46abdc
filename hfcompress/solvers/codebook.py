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
Scalar codebooks: every row has levels of its own, wherever they are best, and its weights are numbers of levels.

The levels begin as those of least `sum_j D_j (w_j - l)^2` over a row, `D` being what an error in each column costs once
the columns after it have made up for it (weighted k-means in one dimension, exact: SqueezeLLM, arXiv 2306.07629, takes
the diagonal of a Hessian). Then codes are swept as in GPTQ, and with the codes held the levels enter
`tr((V - Q) H (V - Q)^T)` quadratically, row by row, so that the best are the solution of a small linear system (LNQ in
GuidedQuant, arXiv 2505.07004); both in turn, and what is best for a row stays.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.solvers.gptq import BLOCK, Factor


HEAVY = 1e3  # times the most important column
RIDGE = 1e-4  # of the system's mean diagonal: how strongly a level that little depends on is held where it is


@dataclass(frozen=True)
class Levels:
    """
    A weight on codebooks.

    Args:
        codes (`Tensor`): uint8 `(out_features, in_features)`.
        levels (`Tensor`): float32 `(out_features, size)`, each row ascending.
    """

    codes: Tensor
    levels: Tensor

    def values(self) -> Tensor:
        """float32 `(out_features, in_features)`."""
        return self.levels.gather(1, self.codes.long())


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
    rounds: int = 2,
    keep: Tensor | None = None,
) -> Levels:
    """
    Codes and levels so that `tr((V - Q) H (V - Q)^T)` is small, `V` being the target.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32, whose levels are begun with.
        target (`Tensor`): likewise: what should be met.
        gram (`Tensor`): `H`, `(in_features, in_features)` float32.
        factor (`Factor`): of the Gram matrix.
        size (`int`): levels per row.
        dtype (`torch.dtype`): what levels are stored in.
        rounds (`int`, *optional*, defaults to 2): times that levels are improved, and codes swept anew.
        keep (`Tensor`, *optional*): bool like the weight: the others are zero, and remain so.
    """
    damped = factor.damped(gram).cpu()
    ordered = target.cpu().T[factor.order.cpu()].contiguous()
    levels = _stored(best_codebooks(weight.cpu(), factor.importance.cpu(), size, keep), dtype)
    stays = torch.empty(0, 0, dtype=torch.bool) if keep is None else keep.cpu().T[factor.order.cpu()].contiguous()
    best = _swept(ordered, factor, levels, stays)
    least = _losses(ordered, best, damped)
    now = best
    for _ in range(rounds):
        levels = _stored(_refitted(ordered, now, damped, keep is not None), dtype)
        kept = Levels(_nearest(now, levels), levels.sort(1).values)
        for now in (kept, _swept(ordered, factor, kept.levels, stays)):
            losses = _losses(ordered, now, damped)
            better = (losses < least)[:, None]
            best = Levels(torch.where(better, now.codes, best.codes), torch.where(better, now.levels, best.levels))
            least = torch.minimum(losses, least)
    codes = torch.empty_like(best.codes)
    codes[:, factor.order.cpu()] = best.codes
    return Levels(codes.to(weight.device), best.levels.to(weight.device))


def _stored(levels: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return levels.clamp(-limit, limit).to(dtype).float()


def _nearest(found: Levels, levels: Tensor) -> Tensor:
    """The codes of the same levels once these are sorted."""
    ranks = levels.argsort(1).argsort(1).to(torch.uint8)
    return ranks.gather(1, found.codes.long())


def _swept(ordered: Tensor, factor: Factor, levels: Tensor, keep: Tensor) -> Levels:
    """The column sweep of [`hfcompress.solvers.gptq.sweep`] with levels in place of a grid; columns in its order."""
    from hfcompress.kernels.codebooks import sweep_levels

    feedback, errors = factor.feedback.cpu(), torch.zeros_like(ordered)
    codes = torch.empty(ordered.shape, dtype=torch.uint8)
    columns = levels.T.contiguous()
    for start in range(0, len(ordered), BLOCK):
        part = slice(start, min(start + BLOCK, len(ordered)))
        values = torch.addmm(ordered[part], feedback[:start, part].T, errors[:start])
        within = feedback[part, part].contiguous()
        each = (values, ordered[part], columns, within, keep[part], codes[part], errors[part])
        sweep_levels(*(tensor.numpy() for tensor in each))
    return Levels(codes.T.contiguous(), levels)


def _losses(ordered: Tensor, found: Levels, gram: Tensor) -> Tensor:
    """The objective, row by row: float64 `(out_features,)`."""
    error = ordered - found.values().T
    return ((gram @ error) * error).sum(0, dtype=torch.float64)


def _refitted(ordered: Tensor, found: Levels, gram: Tensor, sparse: bool) -> Tensor:
    """
    The best levels for the codes: `S^T H S l = S^T H v` for every row, `S` saying which columns are at which level. Where
    it is `sparse`, the level that is zero remains so.
    """
    size = found.levels.shape[1]
    rows = len(found.codes)
    pulled = gram @ ordered
    system, wanted = torch.empty(rows, size, size), torch.empty(rows, size)
    for level in range(size):
        chosen = found.codes.eq(level).T.float()
        wanted[:, level] = (chosen * pulled).sum(0)
        spread = gram @ chosen
        for other in range(level, size):
            entries = (spread * found.codes.eq(other).T).sum(0)
            system[:, level, other] = system[:, other, level] = entries
    if sparse:
        zero = found.levels == 0
        system.masked_fill_(zero[:, :, None] | zero[:, None, :], 0.0)
        wanted.masked_fill_(zero, 0.0)
    ridge = RIDGE * system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-30)
    system.diagonal(dim1=1, dim2=2).add_(ridge)
    solved = torch.linalg.solve(system.double(), (wanted + ridge * found.levels).double())
    return torch.where(torch.isfinite(solved), solved, found.levels.double()).float()
