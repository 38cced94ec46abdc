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
The column sweep of [`hfcompress.kernels.nearest`] on a CUDA device: one program per tile of rows, which do not depend on
one another, with a block of columns in registers. With `TRITON_INTERPRET=1` it runs on a CPU, slowly.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


ROWS = 32  # of a weight per program: with a block of 128 columns, 32 registers in each of 128 threads
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float32 that this is added to has no digits after the point


@triton.jit
def _sweep(
    values,
    targets,
    scales,
    zeros,
    group,
    feedback,
    codes,
    errors,
    columns,
    rows,
    feedback_stride,
    low,
    high,
    HAS_ZEROS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    place = column[:, None] * rows + row[None, :]
    tile = tl.load(values + place, mask=(column[:, None] < columns) & inside[None, :], other=0.0)
    for j in range(columns):
        value = tl.sum(tl.where(column[:, None] == j, tile, 0.0), axis=0)
        own = tl.load(group + j) * rows + row
        scale = tl.load(scales + own, mask=inside, other=1.0)
        code = (
            tl.div_rn(value, scale) + ROUNDING
        ) - ROUNDING  # to the nearest, of two to the even; clamped if too large
        zero = tl.load(zeros + own, mask=inside & HAS_ZEROS, other=0.0)
        code = tl.minimum(tl.maximum(code + zero, low), high)
        error = tl.load(targets + j * rows + row, mask=inside, other=0.0) - (code - zero) * scale
        tl.store(codes + j * rows + row, code.to(tl.int8), mask=inside)
        tl.store(errors + j * rows + row, error, mask=inside)
        fed = tl.load(feedback + j * feedback_stride + column, mask=(column > j) & (column < columns), other=0.0)
        tile += fed[:, None] * error[None, :]


def sweep_columns(
    values: Tensor,
    targets: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    group: Tensor,
    feedback: Tensor,
    low: int,
    high: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """
    Round a block of columns, one after the other, and let the later ones make up for the errors of the earlier.

    Args:
        values (`Tensor`): float32 `(columns, rows)`, contiguous: the targets with the feedback of all columns before.
        targets (`Tensor`): float32 `(columns, rows)`, contiguous: what should be met.
        scales (`Tensor`): float32 `(groups, rows)`, contiguous.
        zero_points (`Tensor` or `None`): float32, likewise.
        group (`Tensor`): int64 `(columns,)`: the group of each.
        feedback (`Tensor`): float32 `(columns, columns)`, the last dimension contiguous: how the error of one is fed to
            those after it.
        low, high (`int`): the least and the greatest code.
        codes (`Tensor`): int8 `(columns, rows)`, contiguous, written.
        errors (`Tensor`): float32 `(columns, rows)`, contiguous, written.
    """
    columns, rows = values.shape
    kernel: Any = _sweep
    with torch.cuda.device(values.device) if values.is_cuda else nullcontext():
        kernel[(-(-rows // ROWS),)](
            values,
            targets,
            scales,
            scales if zero_points is None else zero_points,
            group,
            feedback,
            codes,
            errors,
            columns,
            rows,
            feedback.stride(0),
            float(low),
            float(high),
            HAS_ZEROS=zero_points is not None,
            COLUMNS=max(16, 1 << (columns - 1).bit_length()),
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=False,  # a product is rounded before it is added, as in the plain operations
        )
