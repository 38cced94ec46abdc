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
"""Rounding to a grid with gradients: straight through to the weight, learned step size for the scale (LSQ)."""

import math

import torch
from torch import Tensor

from hfcompress.solvers.grid import Grid, QuantizedWeight


MARGIN = 0.05  # of a step: how far from its cell's edge a weight starts at least


def positions(weight: Tensor, start: QuantizedWeight, margin: float = MARGIN) -> Tensor:
    """
    Where the weights lie on the grid of `start`, in steps from zero, each moved into the cell of its code.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32, before it was rounded.
        start (`QuantizedWeight`): the same after it was rounded, by whatever solver.
        margin (`float`, *optional*, defaults to 0.05): the cell is `code +- (0.5 - margin)`.

    Returns:
        `Tensor`: float32 `(out_features, in_features)`; [`fake_quantize`] makes exactly the codes of `start` of it.
    """
    groups = start.scales.shape[1]
    codes = start.codes.float().view(len(weight), groups, -1)
    if start.zero_points is not None:
        codes = codes - start.zero_points.float().unsqueeze(-1)
    exact = weight.float().view_as(codes) / start.scales.float().unsqueeze(-1)
    return exact.clamp(codes - (0.5 - margin), codes + (0.5 - margin)).view_as(weight)


def round_to_codes(
    position: Tensor, start_scales: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid
) -> Tensor:
    """The codes (with zero points, as float32) of `position` when the scales have become `scales`."""
    moved, low, high = _moved(position, start_scales, scales, zero_points, grid)
    codes = moved.round_().clamp_(low, high)
    if zero_points is not None:
        codes += zero_points.float().unsqueeze(-1)
    return codes.view_as(position)


def fake_quantize(
    position: Tensor, start_scales: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid
) -> Tensor:
    """
    The values `scale * clamp(round(weight / scale))`, where `weight = position * start_scale`.

    The gradient to the weight goes straight through the rounding within the cells of the grid's codes. The gradient to
    a scale is `sum_j (code_j - weight_j / scale)` within the cells and `sum_j code_j` beyond, times
    `1 / sqrt(n * q_max)` for the `n` weights that share it (LSQ, arXiv 1902.08153, eq. 3 and section 2.2). One thing
    differs: LSQ ends the gradient at the outermost codes, here it ends half a step beyond them, where their cells
    end, or half of the weights on a 2-bit grid would have none.

    Args:
        position (`Tensor`): float32 `(out_features, in_features)`, in steps of `start_scales` from zero.
        start_scales (`Tensor`): float32 `(out_features, groups)`, fixed.
        scales (`Tensor`): float32 `(out_features, groups)`.
        zero_points (`Tensor` or `None`): int8 `(out_features, groups)`, fixed.
        grid (`Grid`): the grid.
    """
    return _FakeQuantize.apply(position, start_scales, scales, zero_points, grid)


def _moved(position, start_scales, scales, zero_points, grid):
    """`weight / scale` `(out_features, groups, columns)`, and the least and the greatest code less the zero point."""
    moved = position.view(*scales.shape, -1) * (start_scales / scales).unsqueeze(-1)
    zero = torch.zeros((), device=position.device) if zero_points is None else zero_points.float().unsqueeze(-1)
    return moved, grid.q_min - zero, grid.q_max - zero


class _FakeQuantize(torch.autograd.Function):
    """Keeps the arguments alone for the way back: no second copy of the weight."""

    @staticmethod
    def forward(ctx, position, start_scales, scales, zero_points, grid):
        ctx.save_for_backward(position, start_scales, scales, zero_points)
        ctx.grid = grid
        moved, low, high = _moved(position, start_scales, scales, zero_points, grid)
        return (moved.round_().clamp_(low, high) * scales.unsqueeze(-1)).view_as(position)

    @staticmethod
    def backward(ctx, *grads):
        position, start_scales, scales, zero_points = ctx.saved_tensors
        moved, low, high = _moved(position, start_scales, scales, zero_points, ctx.grid)
        grad = grads[0].view_as(moved)
        inside = (moved >= low - 0.5) & (moved <= high + 0.5)
        to_position = to_scales = None
        if ctx.needs_input_grad[0]:
            to_position = (grad * inside * start_scales.unsqueeze(-1)).view_as(position)
        if ctx.needs_input_grad[2]:
            codes = moved.round().clamp_(low, high)
            to_scales = (grad * (codes - moved * inside)).sum(-1)
            to_scales *= 1 / math.sqrt(moved.shape[-1] * ctx.grid.q_max)
        return to_position, None, to_scales, None, None
