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
Inner loops of rounding to an integer grid whose rows do not depend on one another.

The reference beside each is plain torch: [`hfcompress.solvers.gptq.sweep`] column by column, and
[`hfcompress.solvers.scales`] candidate by candidate. What is saved is memory traffic: every value is read once.
"""

import numpy as np
from numba import njit, prange


ROWS = 128  # of a weight that one core takes at a time, so that a block of columns stays in its cache


@njit(parallel=True, cache=True)
def sweep_columns(values, targets, scales, zeros, group, feedback, low, high, codes, errors):
    """
    Round a block of columns, one after the other, and let the later ones make up for the errors of the earlier.

    Args:
        values (`ndarray`): float32 `(columns, rows)`: the targets with the feedback of all columns before the block; used
            up.
        targets (`ndarray`): float32 `(columns, rows)`: what should be met.
        scales (`ndarray`): float32 `(groups, rows)`.
        zeros (`ndarray`): float32 `(groups, rows)`: zero points; empty where there are none.
        group (`ndarray`): int64 `(columns,)`: the group of each.
        feedback (`ndarray`): float32 `(columns, columns)`: how the error of one is fed to those after it.
        low, high (`float`): the least and the greatest code.
        codes (`ndarray`): int8 `(columns, rows)`, written.
        errors (`ndarray`): float32 `(columns, rows)`, written.
    """
    columns, rows = values.shape
    for part in prange((rows + ROWS - 1) // ROWS):
        start, stop = part * ROWS, min((part + 1) * ROWS, rows)
        for j in range(columns):
            for before in range(j):
                factor = feedback[before, j]
                for i in range(start, stop):
                    values[j, i] += factor * errors[before, i]
            for i in range(start, stop):
                scale = scales[group[j], i]
                zero = zeros[group[j], i] if zeros.size > 0 else np.float32(0)
                code = np.rint(values[j, i] / scale) + zero
                code = min(max(code, low), high)
                codes[j, i] = code
                errors[j, i] = targets[j, i] - (code - zero) * scale


@njit(parallel=True, cache=True, fastmath={"reassoc", "contract"})
def rounding_errors(groups, importance, scales, zeros, low, high, errors):
    """
    What rounding to the nearest costs, for every row and group: the weighted sum of squared errors.

    Args:
        groups (`ndarray`): float32 `(rows, groups, columns)`.
        importance (`ndarray`): float32 `(groups, columns)`: of the columns.
        scales (`ndarray`): float32 `(rows, groups)`.
        zeros (`ndarray`): float32 `(rows, groups)`: zero points.
        low, high (`float`): the least and the greatest code.
        errors (`ndarray`): float32 `(rows, groups)`, written.
    """
    rows, count, columns = groups.shape
    for row in prange(rows):
        for part in range(count):
            scale, zero = scales[row, part], zeros[row, part]
            total = np.float32(0)
            for j in range(columns):
                value = groups[row, part, j]
                code = min(max(np.rint(value / scale) + zero, low), high)
                error = (code - zero) * scale - value
                total += error * error * importance[part, j]
            errors[row, part] = total
