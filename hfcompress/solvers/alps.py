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
ALPS (Meng et al., arXiv 2406.07831), two-sided: mask and values together by the alternating direction method.

`min tr(C (V - W) H (V - W)^T)` with `W` in the pattern is split in two copies of the weight, one that knows the
objective and one that has the zeros, drawn together by a multiplier and a penalty that grows as long as the mask still
changes, for every block of rows by itself where the pattern lets it. With `H = Q L Q^T` and `C = P M P^T`, found once, the first copy is a division in the basis of eigenvectors.
"""

import torch
from torch import Tensor

from hfcompress.solvers.curvature import RowFactor
from hfcompress.solvers.pattern import Pattern
from hfcompress.solvers.sparsegpt import choose


STEPS = 100
PENALTY = 0.1  # at the start, of the objective's mean curvature
GROWTH = (1.3, 1.2, 1.1)  # of the penalty every few steps: by whether many, some or few entries of the mask changed
CHANGES = (0.1, 0.005)  # of the mask's entries, that are many and some
EVERY = 3


def alps(target: Tensor, gram: Tensor, rows: RowFactor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """
    Args:
        target (`Tensor`): float32 `(in_features, out_features)`, rows in the order of `rows`: what should be met.
        gram (`Tensor`): `(in_features, in_features)`: of the inputs, damped.
        rows (`RowFactor`): what the outputs are worth.
        pattern (`Pattern`): where zeros may lie.

    Returns:
        `tuple[Tensor, Tensor]`: the values, and bool, which of them stay; `(in_features, out_features)` each.
    """
    # scaled so that every entry costs the same by itself: a threshold then means the same everywhere
    size = (gram.diagonal()[:, None] * rows.worth).sqrt()
    scale, bases = gram.diagonal().sqrt(), rows.scaled_eigen()
    levels, basis = torch.linalg.eigh(gram / scale[:, None] / scale)
    wanted = target * size
    curved = _into(wanted, basis, bases)
    worth = torch.cat([values for values, _ in bases]) if bases else torch.ones(target.shape[1])
    curvature = levels.clamp(min=0)[:, None] * worth.clamp(min=0)
    pull = curvature * curved
    together = rows.averages if pattern.is_grouped else _over_all  # blocks are only apart where their masks are
    values, multiplier = wanted, torch.zeros_like(wanted)
    penalty = torch.full(target.shape[1:], PENALTY)
    keep = choose(pattern, values.abs(), rows)
    values = values * keep
    since, going = keep, torch.ones(target.shape[1:], dtype=torch.bool)
    for step in range(1, STEPS + 1):
        free = _out_of(
            (pull + _into(penalty * values - multiplier, basis, bases)) / (curvature + penalty), basis, bases
        )
        drawn = free + multiplier / penalty
        keep = torch.where(going, choose(pattern, drawn.square(), rows), keep)
        values = torch.where(going, drawn * keep, values)
        multiplier += penalty * (free - values)
        if step % EVERY == 0:
            changed = together((keep != since).float())
            going &= changed > 0
            if not going.any():
                break
            some = torch.where(changed > CHANGES[1], GROWTH[1], GROWTH[2])
            penalty *= torch.where(changed > CHANGES[0], GROWTH[0], some)
            since = keep
    return (values / size).contiguous(), keep.contiguous()


def _over_all(columns: Tensor) -> Tensor:
    """The mean of all entries, for every row."""
    return columns.mean().expand(columns.shape[1])


def _into(columns: Tensor, basis: Tensor, bases: list[tuple[Tensor, Tensor]]) -> Tensor:
    """In the basis of the eigenvectors of inputs and outputs."""
    turned = basis.T @ columns
    if not bases:
        return turned
    parts = turned.split([len(values) for values, _ in bases], 1)
    return torch.cat([part @ vectors for part, (_, vectors) in zip(parts, bases, strict=True)], 1)


def _out_of(columns: Tensor, basis: Tensor, bases: list[tuple[Tensor, Tensor]]) -> Tensor:
    if not bases:
        return basis @ columns
    parts = columns.split([len(values) for values, _ in bases], 1)
    turned = torch.cat([part @ vectors.T for part, (_, vectors) in zip(parts, bases, strict=True)], 1)
    return basis @ turned
