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
"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774) in the LDLQ form of [`hfcompress.solvers.gptq`], and two-sided.

The objective is that of [`hfcompress.solvers.two_sided`]: `tr(C E H E^T)` for the error `E` of a weight. Its columns are
gone through from the left; an entry that is zeroed leaves an error that later columns, and later rows of the same block,
make up for. Within a group of N:M all ways to choose are weighed with what the whole group and all columns after it can
make up for, not entry by entry.
"""

import torch
from torch import Tensor

from hfcompress.solvers.curvature import RowFactor
from hfcompress.solvers.gptq import BLOCK, Factor
from hfcompress.solvers.pattern import Pattern


def sparsegpt(target: Tensor, factor: Factor, rows: RowFactor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """
    Choose what stays, and let it make up for what does not.

    Args:
        target (`Tensor`): float32 `(in_features, out_features)`, rows in the order of `rows`: what should be met.
        factor (`Factor`): of the Gram matrix, columns in their own order.
        rows (`RowFactor`): what the outputs are worth.
        pattern (`Pattern`): where zeros may lie.

    Returns:
        `tuple[Tensor, Tensor]`: the values, and bool, which of them stay; `(in_features, out_features)` each.
    """
    from hfcompress.kernels.pruning import prune_columns

    feedback, importance = factor.feedback.cpu(), factor.importance.cpu()
    grouped = pattern.is_grouped
    inverses = group_inverses(feedback, importance, pattern.columns if grouped else 1)
    kept, carried = torch.zeros_like(target), torch.zeros_like(target)
    keep = torch.ones(target.shape, dtype=torch.bool)
    width = BLOCK - BLOCK % pattern.columns if pattern.columns <= BLOCK else pattern.columns
    for start in range(0, len(target), width):
        part = slice(start, min(start + width, len(target)))
        values = torch.addmm(target[part], feedback[:start, part].T, carried[:start])
        if not grouped:
            keep[part] = choose(pattern, values.square() * importance[part, None] * rows.worth, rows)
        prune_columns(
            values.numpy(),
            target[part].numpy(),
            feedback[part, part].contiguous().numpy(),
            rows.feedback.numpy(),
            rows.starts.numpy(),
            rows.stops.numpy(),
            inverses[part.start // inverses.shape[1] : part.stop // inverses.shape[1]].numpy(),
            pattern.zeros,
            keep[part].numpy(),
            kept[part].numpy(),
            carried[part].numpy(),
        )
    return kept, keep


def choose(pattern: Pattern, scores: Tensor, rows: RowFactor) -> Tensor:
    """[`Pattern.mask`] for scores `(columns, out_features)`, rows in the order of `rows`; its blocks are of neighbours."""
    if pattern.is_grouped:
        return pattern.best_of_groups(scores)
    own = torch.empty_like(scores.T)
    own[rows.order] = scores.T
    return pattern.mask(own)[rows.order].T.contiguous()


def group_inverses(feedback: Tensor, importance: Tensor, size: int) -> Tensor:
    """
    For each group of `size` columns its block of the inverse of the Gram matrix of itself and all columns after it:
    with `H = U D U^T` that is `A^T D^-1 A`, `A` the inverse of the block of `U`.

    Args:
        feedback (`Tensor`): the strictly upper triangular part of `U`, `(in_features, in_features)`.
        importance (`Tensor`): `D`, `(in_features,)`.
        size (`int`): columns of a group.

    Returns:
        `Tensor`: float32 `(in_features / size, size, size)`.
    """
    blocks = diagonal_blocks(feedback, size) + torch.eye(size)
    inverse = torch.linalg.inv(blocks)
    return (inverse.mT @ (inverse / importance.view(-1, size, 1))).contiguous()


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks `(n / size, size, size)` along the diagonal of an `(n, n)` matrix."""
    return torch.stack(
        list(matrix.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).unbind(-1))
    )
