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
"""GPTQ (Frantar et al., arXiv 2210.17323) in its LDLQ form (Chee et al., arXiv 2307.13304): same codes, no inverse.

With `H = U D U^T`, `U` unit upper triangular, the column `k` that is rounded is `w_k + sum_{j<k} (w_j - q_j) U_jk`.
GPTQ's own recursion over the rows of the Cholesky factor of `H^-1` gives the same numbers for three times the
arithmetic. The factor depends on the inputs alone, so linears that read the same tensor share it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.scales import choose_scales


BLOCK = 128
SUB_BLOCK = 32
ESCALATION = 4.0
ATTEMPTS = 10
HEADROOM = 0.2  # over the bits: 10 % at 2 bits, 5 % at 4, where it was measured to pay


class NotPositiveDefiniteError(ArithmeticError):
    """The Gram matrix could not be factored at any damping."""


@dataclass(frozen=True)
class Factor:
    """
    What the sweep needs of the inputs.

    Args:
        feedback (`Tensor`): strictly upper triangular part of `U`, `(in_features, in_features)`, columns in the
            order of the sweep.
        order (`Tensor`): int64 `(in_features,)`, the columns in the order in which they are rounded.
        importance (`Tensor`): what a squared rounding error in each column costs once the columns after it have made
            up for it: the diagonal `D` of the factorization, in the original order.
        damping (`float`): the damping that was needed, as a share of the mean diagonal.
        dead (`int`): columns that no calibration token excites.
    """

    feedback: Tensor
    order: Tensor
    importance: Tensor
    damping: float
    dead: int

    def damped(self, gram: Tensor) -> Tensor:
        """The Gram matrix that was factored, `gram` with its damping, columns in the order of the sweep."""
        ordered = gram[self.order][:, self.order]
        diagonal = ordered.diagonal()
        mean = diagonal.mean().item() or 1.0
        diagonal[diagonal == 0] = mean
        diagonal += self.damping * mean
        return ordered


def factorize(gram: Tensor, damping: float = 0.01, act_order: bool = True) -> Factor:
    """
    Factor a Gram matrix `H = U D U^T` by one Cholesky decomposition of the flipped matrix.

    A column that is never excited gets a unit diagonal: its weights are rounded to the nearest grid value, not zeroed.
    Where the factorization fails, the damping grows by a factor of four until it succeeds.

    Args:
        gram (`Tensor`): `X^T X / tokens`, `(in_features, in_features)` float32.
        damping (`float`, *optional*, defaults to 0.01): added to the diagonal, as a share of its mean.
        act_order (`bool`, *optional*, defaults to `True`): round the most excited columns first.

    Raises:
        NotPositiveDefiniteError: no damping was enough.
    """
    excitation = gram.diagonal().clone()
    dead = excitation == 0
    mean = excitation.mean().item() or 1.0
    order = (
        torch.argsort(excitation, descending=True, stable=True)
        if act_order
        else torch.arange(len(gram), device=gram.device)
    )
    flipped = order.flip(0)
    for _ in range(ATTEMPTS):
        damped = gram[flipped][:, flipped]
        diagonal = damped.diagonal()
        diagonal[dead[flipped]] = mean
        diagonal.add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped, diagonal  # of the size of the Gram matrix, as is each of the others
        if info.item() == 0 and torch.isfinite(lower.diagonal()).all():
            break
        damping = max(damping, 1e-4) * ESCALATION
    else:
        raise NotPositiveDefiniteError
    upper = lower.flip(0, 1)
    del lower
    importance = torch.empty_like(excitation)
    importance[order] = upper.diagonal().square()
    upper /= upper.diagonal().clone()
    upper.diagonal().zero_()
    return Factor(upper.contiguous(), order, importance, damping, int(dead.sum()))


def gptq(
    weight: Tensor,
    factor: Factor,
    grid: Grid,
    scale_dtype: torch.dtype,
    search: bool = True,
    target: Tensor | None = None,
) -> QuantizedWeight:
    """
    Round `weight` to `grid` so that `tr((W - Q) H (W - Q)^T)` is small.

    Scales and zero points come from the original weight and stay (static groups), rounded to the dtype they are
    stored in before any error is fed back, so that no group index is needed at inference. The objective is exactly
    `sum_k D_k (v_k - q_k)^2` over the values `v` that are rounded, so the search weights columns by `D`; and since `v`
    is the weight plus the feedback of earlier errors, which widens its range, a searched scale gets some headroom. A
    float grid needs none: its step is relative to the value, and a searched scale seldom fills the range.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32; linears that share their input may be stacked.
        factor (`Factor`): from [`factorize`].
        grid (`Grid`): the grid.
        scale_dtype (`torch.dtype`): the dtype that scales are stored in.
        search (`bool`, *optional*, defaults to `True`): search the scales;
            otherwise the range is the least and greatest value.
        target (`Tensor`, *optional*): what should be met instead of the weight; the scales are still the weight's.
    """
    target = weight if target is None else target
    scales, zero_points = gptq_scales(weight, factor, grid, scale_dtype, search)
    group = factor.order // grid.columns(weight.shape[1])
    codes = sweep(
        target.T[factor.order],
        factor.feedback,
        scales.float().T.contiguous(),
        None if zero_points is None else zero_points.float().T.contiguous(),
        group.tolist(),
        grid,
    )
    unordered = torch.empty_like(codes)
    unordered[factor.order] = codes
    return QuantizedWeight(unordered.T.contiguous(), scales, zero_points, grid)


def gptq_scales(
    weight: Tensor, factor: Factor, grid: Grid, scale_dtype: torch.dtype, search: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points that [`gptq`] starts from; see [`hfcompress.solvers.scales.choose_scales`]."""
    headroom = 1 + HEADROOM / grid.bits if search and grid.type == "int" else 1.0
    return choose_scales(weight, factor.importance, grid, scale_dtype, search, headroom)


def sweep(
    weight: Tensor, feedback: Tensor, scales: Tensor, zero_points: Tensor | None, group: Sequence[int], grid: Grid
) -> Tensor:
    """
    The column sweep, left-looking in lazy blocks: one GEMM brings a block up to date with all errors before it.

    Args:
        weight (`Tensor`): `(in_features, out_features)`: its columns are rows, in the order of the sweep, so that each is
            contiguous.
        feedback (`Tensor`): of [`Factor`].
        scales (`Tensor`): float32 `(groups, out_features)`.
        zero_points (`Tensor` or `None`): likewise.
        group (`Sequence[int]`): the group of every column, in the order of the sweep.
        grid (`Grid`): the grid.

    Returns:
        `Tensor`: codes `(in_features, out_features)` in the grid's dtype.
    """
    errors = torch.zeros_like(weight)
    codes = torch.empty(weight.shape, dtype=grid.dtype, device=weight.device)
    within, width = _inner_loop(weight.device, grid)
    for start in range(0, len(weight), BLOCK):
        stop = min(start + BLOCK, len(weight))
        block = torch.addmm(weight[start:stop], feedback[:start, start:stop].T, errors[:start])
        for sub in range(start, stop, width):
            end = min(sub + width, stop)
            values = block[sub - start : end - start]
            if sub > start:
                values = torch.addmm(values, feedback[start:sub, sub:end].T, errors[start:sub])
            within(weight, values, feedback, scales, zero_points, group, grid, sub, end, errors, codes)
    return codes


def _inner_loop(device: torch.device, grid: Grid) -> tuple[Callable[..., None], int]:
    """What goes from column to column, and how many it takes at a time."""
    if grid.type == "int" and device.type == "cpu":
        return _sweep_compiled, SUB_BLOCK
    if grid.type == "int" and device.type == "cuda" and find_spec("triton") is not None:
        return _sweep_on_cuda, BLOCK
    return _sweep_columns, SUB_BLOCK


def _sweep_on_cuda(weight, values, feedback, scales, zero_points, group, grid, start, stop, errors, codes) -> None:
    """[`_sweep_columns`] on a CUDA device."""
    from hfcompress.kernels.nearest_cuda import sweep_columns  # Triton is there only with torch for such a device

    part = slice(start, stop)
    groups = torch.tensor(group[part], device=weight.device)
    within = feedback[part, part]
    low, high = grid.q_min, grid.q_max
    sweep_columns(values, weight[part], scales, zero_points, groups, within, low, high, codes[part], errors[part])


def _sweep_compiled(weight, values, feedback, scales, zero_points, group, grid, start, stop, errors, codes) -> None:
    """[`_sweep_columns`] on a CPU."""
    from hfcompress.kernels.nearest import sweep_columns  # which takes a moment to import

    zeros = values[:0] if zero_points is None else zero_points
    sweep_columns(
        *(each.numpy() for each in (values, weight[start:stop], scales, zeros)),
        np.asarray(group[start:stop]),
        feedback[start:stop, start:stop].contiguous().numpy(),
        np.float32(grid.q_min),
        np.float32(grid.q_max),
        codes[start:stop].numpy(),
        errors[start:stop].numpy(),
    )


def _sweep_columns(weight, values, feedback, scales, zero_points, group, grid, start, stop, errors, codes) -> None:
    """Columns `start` to `stop`, one after the other; `values` already holds the feedback from before `start`."""
    for column in range(start, stop):
        value = values[column - start]
        if column > start:
            value = torch.addmv(value, errors[start:column].T, feedback[start:column, column])
        scale = scales[group[column]]
        zero_point = None if zero_points is None else zero_points[group[column]]
        code = grid.round(value, scale, zero_point)
        codes[column] = code
        if zero_point is not None:
            code -= zero_point
        torch.addcmul(weight[column], code, scale, value=-1, out=errors[column])
