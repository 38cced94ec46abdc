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
GPTQ that also knows what the outputs are worth: error fed back along columns and along rows.

The divergence of the whole model is, to second order, `1/2 E[(g^T E x)^2]`, where `E` is the error of a weight, `x` its
input and `g` the gradient of the log-likelihood by its output. With inputs and gradients taken as independent it is
`tr(C E H E^T)`, `H = E[x x^T]`, `C = E[g g^T]` (the approximation of K-FAC, arXiv 1503.05671; used for rounding by YAQA,
arXiv 2505.22988). With `H = U D U^T` and `C = V F V^T`, `U` and `V` unit upper triangular, that is
`sum_ij F_i D_j z_ij^2` for `z = V^T E U`, and `z_ij = v_ij - q_ij` where `v_ij` is known once the entries before it in
its row and column are rounded: rounding `v` to nearest, entry after entry, is Babai's nearest plane for the whole
matrix. GPTQ is the case `C = 1`.

Rows are taken in blocks whose curvature with one another is left out, which bounds the work and the memory.
"""

import torch
from torch import Tensor

from hfcompress.solvers.curvature import RowFactor
from hfcompress.solvers.gptq import BLOCK, Factor, gptq_scales
from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.refine import Rounded


def gptq_two_sided(
    weight: Tensor,
    target: Tensor,
    gram: Tensor,
    factor: Factor,
    rows: RowFactor,
    grid: Grid,
    scale_dtype: torch.dtype,
    search: bool = True,
    rounds: int = 0,
    keep: Tensor | None = None,
) -> QuantizedWeight:
    """
    Round `target` to `grid` so that `tr(C (V - Q) H (V - Q)^T)` is small, `V` being the target.

    Scales and zero points are first chosen from the weight, as in [`hfcompress.solvers.gptq.gptq`]; with `rounds`,
    scales and codes are then improved in turn.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32.
        target (`Tensor`): likewise: the weight, or what should be met instead of it.
        gram (`Tensor`): `X^T X / tokens`, `(in_features, in_features)` float32.
        factor (`Factor`): of the Gram matrix.
        rows (`RowFactor`): of the outputs; `indifferent(out_features)` for GPTQ's own objective.
        grid (`Grid`): an integer grid.
        scale_dtype (`torch.dtype`): the dtype that scales are stored in.
        search (`bool`, *optional*, defaults to `True`): search the scales.
        rounds (`int`, *optional*, defaults to 0): refinements of scales and codes.
        keep (`Tensor`, *optional*): bool, like the weight: which entries may be other than zero.
    """
    device = weight.device
    scales, zero_points = gptq_scales(weight, factor, grid, scale_dtype, search)
    order, group = factor.order.cpu(), (factor.order // grid.columns(weight.shape[1])).cpu()
    own_scales = scales.float().cpu()[rows.order].T.contiguous()
    zeros = None if zero_points is None else zero_points.float().cpu()[rows.order].T.contiguous()
    ordered = target.cpu()[rows.order].T[order].contiguous()
    per_column = None if zeros is None else zeros[group]
    stays = torch.ones(0, 0, dtype=torch.bool) if keep is None else keep.cpu()[rows.order].T[order].contiguous()
    codes = sweep_two_sided(ordered, factor.feedback.cpu(), rows, own_scales[group], per_column, grid, stays)
    if rounds:
        damped = factor.damped(gram).cpu()
        rounded = Rounded(ordered, damped, rows, codes, own_scales, zeros, group, grid, scale_dtype, stays)
        rounded.refine(rounds)
        codes, own_scales = rounded.codes, rounded.scales
        scales = torch.empty_like(own_scales.T)
        scales[rows.order] = own_scales.T
        scales = scales.to(scale_dtype).to(device)
    unordered = torch.empty_like(codes.T)
    unordered[rows.order[:, None], order] = codes.T
    return QuantizedWeight(unordered.to(device), scales, zero_points, grid)


def sweep_two_sided(
    weight: Tensor,
    feedback: Tensor,
    rows: RowFactor,
    scales: Tensor,
    zero_points: Tensor | None,
    grid: Grid,
    keep: Tensor,
) -> Tensor:
    """
    The sweep of [`hfcompress.solvers.gptq.sweep`], with error fed back along the rows too.

    `weight`, `scales` and `zero_points` are float32 `(in_features, out_features)`, columns and rows in the orders of
    the two factors, and `keep` is bool likewise, or empty if every entry may be other than zero.

    Returns:
        `Tensor`: int8 codes `(in_features, out_features)`.
    """
    from hfcompress.kernels.rounding import round_columns

    zeros = torch.zeros_like(weight) if zero_points is None else zero_points
    carried = torch.zeros_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for start in range(0, len(weight), BLOCK):
        stop = min(start + BLOCK, len(weight))
        part = slice(start, stop)
        values = torch.addmm(weight[part], feedback[:start, part].T, carried[:start])
        round_columns(
            values.numpy(),
            weight[part].numpy(),
            scales[part].numpy(),
            zeros[part].numpy(),
            feedback[part, part].contiguous().numpy(),
            rows.feedback.numpy(),
            rows.starts.numpy(),
            rows.stops.numpy(),
            float(grid.q_min),
            float(grid.q_max),
            keep[part].numpy(),
            codes[part].numpy(),
            carried[part].numpy(),
        )
    return codes
