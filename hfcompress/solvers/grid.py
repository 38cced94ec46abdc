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
"""The integer grid that a weight is rounded to, and the rounded weight itself."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """
    A uniform grid: codes `q` in `[-2**(bits-1), 2**(bits-1) - 1]`, values `(q - zero_point) * scale`, one scale per
    row and group of columns.

    A symmetric grid has no zero point. Its scale may be negative, so that all `2**bits` levels are used whichever
    side the larger values are on.

    Args:
        bits (`int`): bits per code, 2 to 8.
        group_size (`int`): columns that share a scale; -1 for the whole row.
        symmetric (`bool`): no zero point.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True

    @property
    def q_min(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def q_max(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def columns(self, in_features: int) -> int:
        """Columns per group for a weight that is `in_features` wide."""
        return in_features if self.group_size == -1 else self.group_size

    def round(self, values: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
        """The codes nearest to `values`, as floats; all arguments broadcast against each other."""
        codes = torch.round(values / scales)
        if zero_points is not None:
            codes += zero_points
        return codes.clamp_(self.q_min, self.q_max)


@dataclass(frozen=True)
class QuantizedWeight:
    """
    A weight on a grid.

    Args:
        codes (`Tensor`): int8 `(out_features, in_features)`.
        scales (`Tensor`): `(out_features, groups)` in the dtype that is stored.
        zero_points (`Tensor` or `None`): int8 `(out_features, groups)`; `None` for a symmetric grid.
        grid (`Grid`): the grid.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    grid: Grid

    def dequantize(self) -> Tensor:
        """The values `(codes - zero_points) * scales`: float32 `(out_features, in_features)`."""
        out_features, in_features = self.codes.shape
        values = self.codes.float().view(out_features, self.scales.shape[1], -1)
        if self.zero_points is not None:
            values = values - self.zero_points.float().unsqueeze(-1)
        return (values * self.scales.float().unsqueeze(-1)).view(out_features, in_features)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same on another device."""
        zero_points = None if self.zero_points is None else self.zero_points.to(device)
        return QuantizedWeight(self.codes.to(device), self.scales.to(device), zero_points, self.grid)

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """The part of it that belongs to output rows `start` to `stop`."""
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        return QuantizedWeight(self.codes[start:stop], self.scales[start:stop], zero_points, self.grid)
