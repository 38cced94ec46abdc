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
What a rounded weight is to make small: `tr(C (V - Q) H (V - Q)^T)`, `V` being what should be met, `H` the Gram matrix of the
inputs and `C` what the outputs are worth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hfcompress.solvers.curvature import RowFactor, indifferent
from hfcompress.solvers.gptq import BLOCK, Factor


@dataclass(frozen=True)
class Objective:
    """
    On the CPU, rows and columns in the orders of the sweep.

    Args:
        target (`Tensor`): `V`, float32 `(out_features, in_features)`.
        gram (`Tensor`): `H`, damped, float32 `(in_features, in_features)`.
        feedback (`Tensor`): of its factor.
        importance (`Tensor`): likewise, float32 `(in_features,)`.
        order (`Tensor`): int64 `(in_features,)`: the columns.
        rows (`RowFactor`): of `C`.
        keep (`Tensor`): bool like the target: the others are zero, and remain so; of no size, all are kept.
    """

    target: Tensor
    gram: Tensor
    feedback: Tensor
    importance: Tensor
    order: Tensor
    rows: RowFactor
    keep: Tensor

    @classmethod
    def of(
        cls, target: Tensor, gram: Tensor, factor: Factor, rows: RowFactor | None = None, keep: Tensor | None = None
    ) -> "Objective":
        """
        Args:
            target (`Tensor`): float32 `(out_features, in_features)`.
            gram (`Tensor`): float32 `(in_features, in_features)`.
            factor (`Factor`): of it.
            rows (`RowFactor`, *optional*): of the outputs, if they are not all worth the same.
            keep (`Tensor`, *optional*): bool like the target.
        """
        rows = indifferent(len(target)) if rows is None else rows
        order = factor.order.cpu()
        every = torch.ones(0, 0, dtype=torch.bool)
        stays = every if keep is None else keep.cpu()[rows.order][:, order].contiguous()
        own = (target.cpu()[rows.order][:, order].contiguous(), factor.damped(gram).cpu(), factor.feedback.cpu())
        return cls(*own, factor.importance.cpu()[order], order, rows, stays)

    @property
    def sparse(self) -> bool:
        """Whether some are zero."""
        return len(self.keep) > 0

    @property
    def worth(self) -> Tensor:
        """The diagonal of `C`: float32 `(out_features,)`."""
        return self.rows.worth * self.rows.units

    @property
    def rest(self) -> Tensor:
        """What a squared error of each row costs once the rows after it have made up for it: float32 `(out_features,)`."""
        return self.rows.importance[self.rows.order]

    @property
    def curvature(self) -> Tensor:
        """`C` as [`RowFactor`] has it, in units in which blocks compare."""
        return self.rows.curvature * self.rows.units[:, None]

    def slopes(self, error: Tensor) -> Tensor:
        """`C E H`: half of what the objective falls by with every weight."""
        rows, product = self.rows, error @ self.gram
        if rows.curvature.shape[1] == 1:
            return product.mul_(self.worth[:, None])
        found = torch.empty_like(product)
        for start, stop in zip(rows.starts.tolist(), rows.stops.tolist(), strict=True):
            torch.mm(rows.curvature[start:stop, : stop - start], product[start:stop], out=found[start:stop])
        return found.mul_(rows.units[:, None])

    def losses(self, values: Tensor) -> Tensor:
        """The objective for some values of the weight, for every row that of its block: float64 `(out_features,)`."""
        error = self.target - values
        return self.rows.totals((self.slopes(error) * error).T)

    def loss(self, values: Tensor) -> float:
        """Of all blocks."""
        return self.losses(values)[self.rows.starts].sum().item()

    def rows_unordered(self, found: Tensor) -> Tensor:
        """A tensor with rows in the order of the sweep, in their own."""
        other = torch.empty_like(found)
        other[self.rows.order] = found
        return other


def blocks(columns: int, length: int = 1) -> list[slice]:
    """Columns that are swept together, whole vectors of them."""
    bounds = [*range(0, columns, max(BLOCK // length, 1) * length), columns]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def run_kernel(kernel: Callable[..., None], *given: Tensor | int, written: Sequence[Tensor]) -> None:
    """Run a compiled kernel on arrays: on what it is given, and behind that on what it writes, which has to be contiguous."""
    assert all(each.is_contiguous() for each in written)
    arrays = (each.contiguous().numpy() if isinstance(each, Tensor) else each for each in given)
    kernel(*arrays, *(each.numpy() for each in written))
