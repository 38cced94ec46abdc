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
Mixtures of Gaussians in one dimension, for the levels of codebooks: where k-means gives each weight to one level, a mixture
gives it to each by how likely it is of it (EM; Dempster, Laird and Rubin 1977).
"""

import torch
from torch import Tensor


ROUNDS = 30
FLOOR = 1e-2  # of the spread about the means that are begun with: the least there may be about one
AT_ONCE = 1 << 22  # weights times levels


def mixture_means(weight: Tensor, importance: Tensor, levels: Tensor, keep: Tensor | None = None) -> Tensor:
    """
    The means of the mixture, with as many parts as there are levels, that makes a row's weights most likely, each counted as
    often as it is important; found from the levels at hand.

    Args:
        weight (`Tensor`): float32 `(rows, columns)`.
        importance (`Tensor`): float32 `(columns,)`: of the columns.
        levels (`Tensor`): float32 `(rows, size)`: the means that are begun with.
        keep (`Tensor`, *optional*): bool like the weight: the others are not looked at, and a level that is zero remains so.

    Returns:
        `Tensor`: float32 `(rows, size)`, each row ascending.
    """
    step = max(1, AT_ONCE // (weight.shape[1] * levels.shape[1]))
    parts = []
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        parts.append(_fitted(weight[part], importance, levels[part], None if keep is None else keep[part]))
    return torch.cat(parts)


def _fitted(weight: Tensor, importance: Tensor, levels: Tensor, keep: Tensor | None) -> Tensor:
    counts = (importance / importance.mean().clamp(min=1e-30)).expand_as(weight)
    if keep is not None:
        counts = counts * keep
    total = counts.sum(1, keepdim=True).clamp(min=1e-30)
    distances = (weight[:, :, None] - levels[:, None]).square()
    spread = (counts * distances.amin(2)).sum(1, keepdim=True) / total
    spread = spread.clamp(min=torch.finfo(weight.dtype).tiny)
    means, variances = levels.clone(), spread.expand_as(levels)
    shares = torch.full_like(levels, 1 / levels.shape[1])
    fixed = levels == 0 if keep is not None else torch.zeros_like(levels, dtype=torch.bool)
    for _ in range(ROUNDS):
        distances = (weight[:, :, None] - means[:, None]).square()
        likely = shares.clamp(min=1e-30).log() - variances.log() / 2
        own = (likely[:, None] - distances / (2 * variances[:, None])).softmax(2) * counts[:, :, None]
        sizes = own.sum(1)
        found = (own * weight[:, :, None]).sum(1) / sizes.clamp(min=1e-30)
        means = torch.where(fixed | (sizes < 1e-6), means, found)
        apart = (own * (weight[:, :, None] - means[:, None]).square()).sum(1) / sizes.clamp(min=1e-30)
        variances, shares = torch.maximum(apart, FLOOR * spread), sizes / total
    return means.sort(1).values
