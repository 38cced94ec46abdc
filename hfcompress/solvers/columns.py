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
Which inputs of a linear can go, when the rest makes up for them.

For `min ||V X - W X||^2` over weights `W` whose columns in a set are zero, removing unit after unit (a unit being one
column, or those of a group of heads) is Optimal Brain Surgeon on groups (Hassibi and Stork 1993; Kurtic et al., ZipLM,
arXiv 2302.04089): with `G = H^-1` the unit `u` costs `tr(V_u (G_uu)^-1 V_u^T)`, what stays becomes
`V - V_u (G_uu)^-1 G_u`, and `G` loses the unit by a Schur complement. After the last removal what stays is the least
squares solution for the columns that are left, so the refit comes with the choice.
"""

import torch
from torch import Tensor


ROUNDS = 32  # in which units are removed, their costs told anew in between


def remove_columns(
    target: Tensor, gram: Tensor, units: Tensor, keep: int, worth: Tensor | None = None, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """
    Args:
        target (`Tensor`): `V`, `(out_features, in_features)` float32.
        gram (`Tensor`): `H`, `(in_features, in_features)` float32, damped.
        units (`Tensor`): int64 `(in_features,)`: the unit of every column, numbered from 0, all of the same size.
        keep (`int`): units that stay.
        worth (`Tensor`, *optional*): a root `R` of what errors of the outputs cost, `C = R^T R`:
            `(any, out_features)`; all the same if left out.
        rounds (`int`, *optional*, defaults to 32): how often costs are told anew.

    Returns:
        `tuple[Tensor, Tensor]`: int64, the columns that stay, ascending; and their values,
        `(out_features, kept columns)`.
    """
    count = int(units.max()) + 1
    order = torch.argsort(units, stable=True)
    size = len(units) // count
    values, seen = target[:, order], (target if worth is None else worth @ target)[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order].double())).to(target.dtype)
    left = torch.arange(count, device=target.device)
    while len(left) > keep:
        some = -(-(count - keep) // rounds)
        gone = _cheapest(seen, inverse, size, min(some, len(left) - keep))
        columns = torch.zeros(len(left), size, dtype=torch.bool, device=target.device)
        columns[gone] = True
        out, rest = columns.flatten().nonzero().flatten(), (~columns.flatten()).nonzero().flatten()
        pull = torch.linalg.solve(inverse[out][:, out].double(), inverse[out][:, rest].double()).to(target.dtype)
        values = values[:, rest] - values[:, out] @ pull
        seen = seen[:, rest] - seen[:, out] @ pull
        inverse = inverse[rest][:, rest] - inverse[rest][:, out] @ pull
        left = left[~columns.any(1)]
    stays = order.view(count, size)[left].flatten()
    ascending = torch.argsort(stays)
    return stays[ascending], values[:, ascending]


def _cheapest(seen: Tensor, inverse: Tensor, size: int, count: int) -> Tensor:
    """The `count` units whose removal, each by itself, costs least."""
    units = seen.shape[1] // size
    columns = seen.T.reshape(units, size, -1)
    blocks = torch.stack(
        list(inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).unbind(0))
    )
    costs = (torch.linalg.solve(blocks, columns) * columns).sum((1, 2))
    return costs.topk(count, largest=False).indices
