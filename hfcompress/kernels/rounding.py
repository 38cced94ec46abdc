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
Rounding whose error is fed back along rows and columns, one entry of the weight after the other.

Entries depend on all before them in their column and row, so no tensor operation does this; but blocks of rows that
share no curvature are independent, and are shared among the cores. Everything is laid out with the columns of the
weight as rows, `(columns, rows)`, as in [`hfcompress.solvers.gptq.sweep`].
"""

import numpy as np
from numba import njit, prange


@njit(parallel=True, fastmath=True, cache=True)
def round_columns(values, targets, scales, zeros, across, down, starts, stops, low, high, keep, codes, carried):
    """
    Round a few columns, each row after row.

    Args:
        values (`ndarray`): float32 `(columns, rows)`: the targets with the feedback of all columns before these; used
            up.
        targets (`ndarray`): float32 `(columns, rows)`: what should be met.
        scales (`ndarray`): float32 `(columns, rows)`.
        zeros (`ndarray`): float32 `(columns, rows)`: zero points.
        across (`ndarray`): float32 `(columns, columns)`: how the error of one column is fed to those after it.
        down (`ndarray`): float32 `(rows, block)`: how the error of a row is fed to those after it in its block.
        starts, stops (`ndarray`): int64 `(blocks,)`: the blocks of rows.
        low, high (`float`): the least and the greatest code.
        keep (`ndarray`): bool `(columns, rows)`: which entries may be other than zero; empty for all.
        codes (`ndarray`): int8 `(columns, rows)`, written.
        carried (`ndarray`): float32 `(columns, rows)`, written: each error plus what it receives from the rows above.
    """
    for block in prange(len(starts)):
        start, stop = starts[block], stops[block]
        above = np.empty(stop - start, np.float32)
        for j in range(len(targets)):
            for before in range(j):
                factor = across[before, j]
                for i in range(start, stop):
                    values[j, i] += factor * carried[before, i]
            above[:] = 0
            for i in range(start, stop):
                scale, zero = scales[j, i], zeros[j, i]
                code = np.rint((values[j, i] + above[i - start]) / scale) + zero
                code = min(max(code, low), high)
                if keep.size > 0 and not keep[j, i]:
                    code = zero
                codes[j, i] = code
                error = targets[j, i] - (code - zero) * scale
                carried[j, i] = above[i - start] + error
                for k in range(i + 1 - start, stop - start):
                    above[k] += down[i, k] * error


@njit(parallel=True, fastmath=True, cache=True)
def descend_columns(slopes, gram, curvature, scales, starts, stops, low, high, keep, codes, moved):
    """
    Move the codes of a few columns to where the objective is least, one after the other, the others held.

    Args:
        slopes (`ndarray`): float32 `(columns, rows)`: half the objective's derivatives by the rounded weight, with the
            sign of descent, all moves of other columns taken in; used up.
        gram (`ndarray`): float32 `(columns, columns)`: of the inputs, damped.
        curvature (`ndarray`): float32 `(rows, block)`: of the outputs, damped; each row's own block.
        scales (`ndarray`): float32 `(columns, rows)`.
        starts, stops (`ndarray`): int64 `(blocks,)`: the blocks of rows.
        low, high (`float`): the least and the greatest code.
        keep (`ndarray`): bool `(columns, rows)`: which entries may be other than zero; empty for all.
        codes (`ndarray`): int8 `(columns, rows)`, changed.
        moved (`ndarray`): float32 `(columns, rows)`, zeros on entry; written: curvature times the change in value.
    """
    for block in prange(len(starts)):
        start, stop = starts[block], stops[block]
        for j in range(len(slopes)):
            for before in range(j):
                factor = gram[before, j]
                for i in range(start, stop):
                    slopes[j, i] -= factor * moved[before, i]
            own = gram[j, j]
            for i in range(start, stop):
                scale = scales[j, i]
                old = np.float32(codes[j, i])
                code = old + np.rint(slopes[j, i] / (curvature[i, i - start] * own * scale))
                code = min(max(code, low), high)
                if code != old and (keep.size == 0 or keep[j, i]):
                    codes[j, i] = code
                    change = (code - old) * scale
                    for k in range(stop - start):
                        push = curvature[i, k] * change
                        slopes[j, start + k] -= push * own
                        moved[j, start + k] += push
