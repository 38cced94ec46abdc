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
The best values for a mask, and a better mask for the values.

With the mask held, `tr(C (V - W) H (V - W)^T)` is a quadratic form of the entries that stay: masked least squares. It is
solved for all rows at once by conjugate gradients, in steps of its own for every block of rows that belong together, so
that it does not matter which are solved together. With all other entries held, those of one group of N:M are few
enough to be chosen anew, best set and best values together, group after group (block coordinate descent). Both only
ever lower the objective.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.solvers.curvature import RowFactor, ratio
from hfcompress.solvers.gptq import BLOCK, Factor
from hfcompress.solvers.pattern import Pattern
from hfcompress.solvers.sparsegpt import diagonal_blocks


STEPS = 30
TOLERANCE = 1e-2  # of the residual's norm; a tenth of it took ten times as long and gained one part in seventy


@dataclass
class SparseFit:
    """
    A weight with zeros, in the orders of the sweep, columns as rows.

    Args:
        target (`Tensor`): `(in_features, out_features)` float32: what should be met.
        gram (`Tensor`): `(in_features, in_features)`: of the inputs, damped.
        rows (`RowFactor`): what the outputs are worth.
        values (`Tensor`): `(in_features, out_features)` float32.
        keep (`Tensor`): bool, likewise: which of them stay.
        pattern (`Pattern`): where zeros may lie.
    """

    target: Tensor
    gram: Tensor
    rows: RowFactor
    values: Tensor
    keep: Tensor
    pattern: Pattern

    @classmethod
    def of(cls, target: Tensor, gram: Tensor, factor: Factor, rows: RowFactor, pattern: Pattern) -> "SparseFit":
        """
        Begin with the whole of a weight.

        Args:
            target (`Tensor`): `(out_features, in_features)` float32.
            gram (`Tensor`): `X^T X / tokens`, `(in_features, in_features)` float32.
            factor (`Factor`): of the Gram matrix, columns in their own order.
            rows (`RowFactor`): what the outputs are worth.
            pattern (`Pattern`): where zeros may lie.
        """
        ordered = target.cpu()[rows.order].T.contiguous()
        keep = torch.ones(ordered.shape, dtype=torch.bool)
        return cls(ordered, factor.damped(gram).cpu(), rows, ordered.clone(), keep, pattern)

    def take(self, keep: Tensor) -> None:
        """Let `keep`, bool `(out_features, in_features)` in the weight's own order, say what stays."""
        self.keep = keep.cpu()[self.rows.order].T.contiguous()
        self.values = self.target * self.keep

    def refine(self, rounds: int) -> None:
        """Choose all groups of N:M anew, `rounds` times; given up when that gains nothing."""
        for _ in range(rounds if self.pattern.is_grouped else 0):
            if not self.descend():
                return

    def unordered(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The values, and which of them stay: `(out_features, in_features)` each, in the weight's own order."""
        values, keep = torch.empty_like(self.values.T), torch.empty_like(self.keep.T)
        values[self.rows.order], keep[self.rows.order] = self.values.T, self.keep.T
        return values.to(device), keep.to(device)

    def refit(self, steps: int = STEPS, tolerance: float = TOLERANCE) -> int:
        """
        The best values for the mask, by conjugate gradients from those at hand.

        Returns:
            `int`: the steps that it took.
        """
        residual = self._slopes(self.values) * self.keep
        scale = self.gram.diagonal()[:, None] * self.rows.worth
        moved = residual / scale
        direction, norm = moved.clone(), self.rows.totals(residual * moved)
        enough = tolerance**2 * norm
        for step in range(steps):
            going = norm > enough
            if not going.any():
                return step
            bent = self._curved(direction).mul_(self.keep)
            length = going * ratio(norm, self.rows.totals(direction * bent))
            self.values.addcmul_(direction, length)
            residual.addcmul_(bent, length, value=-1)
            torch.div(residual, scale, out=moved)
            norm, last = self.rows.totals(residual * moved), norm
            direction.mul_(ratio(norm, last)).add_(moved)
        return steps

    def descend(self) -> bool:
        """
        Choose every group of N:M anew, one after the other; taken where a block of rows gains by it.

        Returns:
            `bool`: whether any did.
        """
        from hfcompress.kernels.pruning import descend_groups

        size = self.pattern.columns
        inverses = torch.linalg.inv(diagonal_blocks(self.gram, size)).contiguous()
        before, moved = self._losses(self.values), torch.zeros_like(self.target)
        all_slopes, values = self._slopes(self.values), self.values.clone()
        width = BLOCK - BLOCK % size
        for start in range(0, len(values), width):
            part = slice(start, min(start + width, len(values)))
            slopes = torch.addmm(all_slopes[part], self.gram[part, :start], moved[:start], alpha=-1)
            descend_groups(
                slopes.numpy(),
                self.gram[part, part].contiguous().numpy(),
                self.rows.curvature.numpy(),
                inverses[part.start // size : part.stop // size].numpy(),
                self.rows.starts.numpy(),
                self.rows.stops.numpy(),
                self.pattern.zeros,
                values[part].numpy(),
                moved[part].numpy(),
            )
        better = self._losses(values) < before
        self.values = torch.where(better, values, self.values)
        self.keep = torch.where(better, values != 0, self.keep)
        return bool(better.any())

    def loss(self) -> float:
        """The objective."""
        return self._losses(self.values)[self.rows.starts].sum().item()

    def _losses(self, values: Tensor) -> Tensor:
        """Each row's block's part of the objective."""
        error = self.target - values
        return self.rows.totals(self._curved(error).mul_(error))

    def _slopes(self, values: Tensor) -> Tensor:
        """Half the objective's derivatives by the values, with the sign of descent."""
        return self._curved(self.target - values)

    def _curved(self, columns: Tensor) -> Tensor:
        return self.rows.times(self.gram @ columns)
