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
"""Scales and zero points, chosen once from the original weight and then frozen.

The search keeps, for every row and group, the candidate with the least `sum_j h_j (Q(w_j) - w_j)^2`, where `h` says
what an error in a column costs, or is ones where there is no data. Shrinking the range trades a few clipped
values for a finer step on all others; weighting by the inputs spends that trade where it shows in the output
(the idea of AutoRound's optimised RTN and llama.cpp's importance matrix).
"""

import numpy as np
import torch
from torch import Tensor

from hfcompress.solvers.grid import Grid


SHRINK_FROM, SHRINK_TO = 1.0, 0.4
COARSE, FINE = 16, 4
VALUES_AT_ONCE = 2**22  # values per chunk: keeps the search's temporaries small


def choose_scales(
    weight: Tensor,
    importance: Tensor | None,
    grid: Grid,
    dtype: torch.dtype,
    search: bool = True,
    headroom: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """
    Args:
        weight (`Tensor`): `(out_features, in_features)` float32.
        importance (`Tensor` or `None`): `(in_features,)`, the weight of each column's squared error; ones if `None`.
        grid (`Grid`): the grid.
        dtype (`torch.dtype`): the dtype that scales are stored in; every candidate is rounded to it before it is tried.
        search (`bool`, *optional*, defaults to `True`): search; otherwise the range is the least and greatest value.
        headroom (`float`, *optional*, defaults to 1.0): factor on the scales that were found.

    Returns:
        `tuple[Tensor, Tensor | None]`: scales `(out_features, groups)` in `dtype`; zero points, int8 of the same
        shape, or `None` for a symmetric grid.
    """
    in_features = weight.shape[1]
    columns = grid.columns(in_features)
    if importance is None:
        importance = weight.new_ones(in_features)
    importance = importance.float().view(-1, columns)
    rows = max(1, VALUES_AT_ONCE // in_features)
    parts = [
        _choose(part.view(len(part), -1, columns), importance, grid, dtype, search) for part in weight.split(rows)
    ]
    scales = storable(torch.cat([scale for scale, _ in parts]) * headroom, dtype).to(dtype)
    zero_points = None if grid.symmetric else torch.cat([zero for _, zero in parts]).to(torch.int8)
    return scales, zero_points


def _choose(groups: Tensor, importance: Tensor, grid: Grid, dtype: torch.dtype, search: bool) -> tuple[Tensor, Tensor]:
    """Best scale and zero point for `groups` `(rows, groups, columns)`; float32 `(rows, groups)` each."""
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    full = _full_range(low, high, grid)
    if not search:
        return storable(full[0], dtype), _zero_points(low, storable(full[0], dtype), grid)
    best = _Best(groups, importance, low, grid, dtype)
    step = (SHRINK_FROM - SHRINK_TO) / (COARSE - 1)
    for index in range(COARSE):
        for range_scales in full:
            best.offer(range_scales, torch.full_like(low, SHRINK_FROM - index * step))
    range_scales, shrink = best.range_scales.clone(), best.shrink.clone()
    for index in range(1, FINE + 1):
        for direction in (-1, 1):
            best.offer(range_scales, shrink + direction * index * step / (FINE + 1))
    return best.scales, best.zero_points


class _Best:
    """The best candidate so far, per row and group."""

    def __init__(self, groups: Tensor, importance: Tensor, low: Tensor, grid: Grid, dtype: torch.dtype):
        self.groups, self.importance, self.low, self.grid, self.dtype = groups, importance, low, grid, dtype
        self.error = torch.full_like(low, float("nan"))  # the first offer is taken, even where its error overflows
        self.scales, self.zero_points = torch.ones_like(low), torch.zeros_like(low)
        self.range_scales, self.shrink = torch.ones_like(low), torch.ones_like(low)

    def offer(self, range_scales: Tensor, shrink: Tensor) -> None:
        scales = storable(range_scales * shrink, self.dtype)
        zero_points = _zero_points(self.low * shrink, scales, self.grid)
        error = rounding_error(self.groups, self.importance, scales, zero_points, self.grid)
        better = (error < self.error) | self.error.isnan()
        offered = {"error": error, "scales": scales, "zero_points": zero_points}
        for name, value in {**offered, "range_scales": range_scales, "shrink": shrink}.items():
            setattr(self, name, torch.where(better, value, getattr(self, name)))


def rounding_error(groups: Tensor, importance: Tensor, scales: Tensor, zero_points: Tensor, grid: Grid) -> Tensor:
    """
    What rounding to the nearest costs, for every row and group: the weighted sum of squared errors.

    Args:
        groups (`Tensor`): float32 `(rows, groups, columns)`.
        importance (`Tensor`): float32 `(groups, columns)`.
        scales (`Tensor`): float32 `(rows, groups)`.
        zero_points (`Tensor`): likewise; zeros for a symmetric grid.
        grid (`Grid`): the grid.
    """
    if groups.device.type != "cpu" or grid.type != "int":
        return plain_rounding_error(groups, importance, scales, zero_points, grid)
    from hfcompress.kernels.nearest import rounding_errors  # which takes a moment to import

    error = torch.empty_like(scales)
    arguments = (groups, importance, scales, zero_points)
    limits = np.float32(grid.q_min), np.float32(grid.q_max)
    rounding_errors(*(each.contiguous().numpy() for each in arguments), *limits, error.numpy())
    return error


def plain_rounding_error(
    groups: Tensor, importance: Tensor, scales: Tensor, zero_points: Tensor, grid: Grid
) -> Tensor:
    """[`rounding_error`] in plain tensor operations."""
    zeros = None if grid.symmetric else zero_points.unsqueeze(-1)
    values = grid.round(groups, scales.unsqueeze(-1), zeros)
    if zeros is not None:
        values -= zeros
    return values.mul_(scales.unsqueeze(-1)).sub_(groups).square_().mul_(importance).sum(-1)


def _full_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """
    The scales at which nothing is clipped. Symmetric: the value of the larger side sits on the code that only one
    side has, `q_min`, or (the second candidate) on `q_max`. On a float grid the largest value sits on the largest
    code, or (the second candidate) an octave below it: there a scale does not set the step, which is relative to the
    value, but where in its octave each value falls.
    """
    if grid.type == "float":
        full = torch.maximum(high, -low) / grid.q_max
        return full, 2 * full
    if not grid.symmetric:
        return ((high - low) / (grid.q_max - grid.q_min),)
    extreme = torch.where(high > -low, high, low)
    return extreme / grid.q_min, extreme / grid.q_max


def _zero_points(low: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    if grid.symmetric:
        return torch.zeros_like(scales)
    return torch.round(grid.q_min - low / scales).clamp_(grid.q_min, grid.q_max)


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the stored dtype; a zero (an all-zero group, or an underflow) becomes one, so that codes are zero."""
    stored = scales.to(dtype).float()
    return torch.where(stored == 0, torch.ones_like(stored), stored)
