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
Better codes and scales from good ones: each in turn moved to where `tr(C E H E^T)` is least while the other is held.

The scales of all rows and groups enter the objective quadratically, so with the codes held they are the solution of a
linear system, found by a few steps of conjugate gradients from the scales at hand (the closed form of Two-Stage Grid,
arXiv 2602.02126, for scales that are coupled across rows). With the scales held, the codes are gone through one by
one, each moved to its best value (cyclic coordinate descent). Neither is kept if the objective did not fall.

Rows in different blocks of `C` have nothing to do with one another: each block has its own steps and keeps what is better
for it, so that it does not matter which blocks are solved together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.solvers.conjugate import conjugate_gradients
from hfcompress.solvers.curvature import RowFactor
from hfcompress.solvers.gptq import BLOCK
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.scales import storable


CG_STEPS = 8


@dataclass
class Rounded:
    """
    A weight on its grid in the orders of the sweep, columns as rows.

    Args:
        target (`Tensor`): `(in_features, out_features)` float32: what should be met.
        gram (`Tensor`): `(in_features, in_features)`: of the inputs, damped.
        rows (`RowFactor`): what the outputs are worth.
        codes (`Tensor`): int8 `(in_features, out_features)`.
        scales (`Tensor`): `(groups, out_features)` float32, as they are stored.
        zeros (`Tensor` or `None`): `(groups, out_features)` float32: zero points, which stay.
        group (`Tensor`): int64 `(in_features,)`: the group of every column.
        grid (`Grid`): the grid.
        dtype (`torch.dtype`): what scales are stored in.
        keep (`Tensor`): bool `(in_features, out_features)`: which entries may be other than zero; empty for all.
    """

    target: Tensor
    gram: Tensor
    rows: RowFactor
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: Tensor
    grid: Grid
    dtype: torch.dtype
    keep: Tensor

    def __post_init__(self):
        self.slopes, self.losses = self._slopes(self.codes, self.scales)

    @property
    def loss(self) -> float:
        """The objective."""
        return self.losses[self.rows.starts].sum().item()

    def refine(self, rounds: int) -> None:
        """Scales and codes in turn, `rounds` times, and the scales once more; given up when a turn gains nothing."""
        for _ in range(rounds):
            before = self.losses
            self.refit_scales()
            self.descend_codes()
            if not (self.losses < before).any():
                return
        if rounds:
            self.refit_scales()

    def refit_scales(self) -> None:
        """The scales that are best for the codes."""
        levels = self._levels(self.codes)
        residual = self._by_group(self.slopes * levels)
        diagonal = self._scale_curvature(levels)

        def curved(scales: Tensor) -> Tensor:
            return self._by_group(self._curved(scales[self.group] * levels) * levels)

        step = conjugate_gradients(residual, diagonal, curved, self.rows.totals, CG_STEPS)
        scales = storable(self.scales + step, self.dtype)
        self._offer(self.codes, torch.where(torch.isfinite(scales), scales, self.scales))

    def descend_codes(self) -> None:
        """Every code to its best value, one after the other."""
        from hfcompress.kernels.rounding import descend_columns

        codes, moved = self.codes.clone(), torch.zeros_like(self.target)
        scales = self.scales[self.group]
        for start in range(0, len(codes), BLOCK):
            part = slice(start, min(start + BLOCK, len(codes)))
            slopes = torch.addmm(self.slopes[part], self.gram[part, :start], moved[:start], alpha=-1)
            descend_columns(
                slopes.numpy(),
                self.gram[part, part].contiguous().numpy(),
                self.rows.curvature.numpy(),
                scales[part].numpy(),
                self.rows.starts.numpy(),
                self.rows.stops.numpy(),
                float(self.grid.q_min),
                float(self.grid.q_max),
                self.keep[part].numpy(),
                codes[part].numpy(),
                moved[part].numpy(),
            )
        self._offer(codes, self.scales)

    def _offer(self, codes: Tensor, scales: Tensor) -> None:
        """Take what is better for a block."""
        slopes, losses = self._slopes(codes, scales)
        better = losses < self.losses
        if not better.any():
            return
        self.losses = torch.where(better, losses, self.losses)
        self.codes = torch.where(better, codes, self.codes)
        self.scales = torch.where(better, scales, self.scales)
        self.slopes = torch.where(better, slopes, self.slopes)

    def _slopes(self, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """`(C E H)^T`, and each row's block's part of the objective."""
        error = self.target - self._levels(codes) * scales[self.group]
        slopes = self._curved(error)
        return slopes, self.rows.totals(slopes * error)

    def _curved(self, columns: Tensor) -> Tensor:
        return self.rows.times(self.gram @ columns)

    def _levels(self, codes: Tensor) -> Tensor:
        levels = codes.float()
        return levels if self.zeros is None else levels - self.zeros[self.group]

    def _by_group(self, columns: Tensor) -> Tensor:
        return torch.zeros_like(self.scales).index_add_(0, self.group, columns)

    def _scale_curvature(self, levels: Tensor) -> Tensor:
        """The diagonal of the system: what moving one scale alone costs."""
        diagonal = torch.empty_like(self.scales)
        for index in range(len(self.scales)):
            own = torch.nonzero(self.group == index).flatten()
            part = levels[own]
            diagonal[index] = ((self.gram[own][:, own] @ part) * part).sum(0)
        diagonal *= self.rows.worth
        return diagonal.clamp_(min=diagonal.mean(0) * 1e-6 + 1e-30)
