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
Inner loops of codebooks: the best levels for the values of a row, and rounding to them with feedback.

The reference beside the first is [`hfcompress.solvers.codebook.Levels`]'s own objective over all ways to cut a few values;
that of the second is [`hfcompress.solvers.gptq.sweep`] with levels in place of a grid.
"""

import numpy as np
from numba import njit, prange


ROWS = 128  # of a weight that one core takes at a time


@njit(cache=True)
def _cost(sums, squares, weights, first, last):
    """What values `first` to `last` lose where they are all their mean."""
    weight = weights[last] - weights[first]
    if weight <= 0:
        return 0.0
    total = sums[last] - sums[first]
    return max(squares[last] - squares[first] - total * total / weight, 0.0)


@njit(cache=True)
def _fill(sums, squares, weights, before, losses, cuts, low, high, left, right):
    """
    The least losses of the first `low` to `high` values in one more cluster than `before`, and where the last cluster
    begins. The best cut moves up with the number of values, so that half of them bound the others (divide and conquer).
    """
    stack = [(low, high, left, right)]
    while len(stack) > 0:
        low, high, left, right = stack.pop()
        if low > high:
            continue
        middle = (low + high) // 2
        best, place = np.inf, left
        for cut in range(left, min(right, middle) + 1):
            found = before[cut] + _cost(sums, squares, weights, cut, middle)
            if found < best:
                best, place = found, cut
        losses[middle], cuts[middle] = best, place
        stack.append((low, middle - 1, left, place))
        stack.append((middle + 1, high, place, right))


@njit(parallel=True, cache=True)
def best_levels(values, weights, levels):
    """
    For every row the levels of least weighted squared error, its values each at the nearest: k-means in one dimension,
    solved exactly by dynamic programming over cuts of the sorted values (Wang and Song 2011).

    Args:
        values (`ndarray`): float32 `(rows, columns)`, each row ascending.
        weights (`ndarray`): float32 `(rows, columns)`, not negative.
        levels (`ndarray`): float32 `(rows, size)`, written, ascending.
    """
    rows, columns = values.shape
    size = levels.shape[1]
    for row in prange(rows):
        sums, squares, heavy = np.zeros(columns + 1), np.zeros(columns + 1), np.zeros(columns + 1)
        for j in range(columns):
            weight, value = np.float64(weights[row, j]), np.float64(values[row, j])
            heavy[j + 1] = heavy[j] + weight
            sums[j + 1] = sums[j] + weight * value
            squares[j + 1] = squares[j] + weight * value * value
        before, losses = np.full(columns + 1, np.inf), np.full(columns + 1, np.inf)
        before[0] = 0.0
        cuts = np.zeros((size, columns + 1), np.int32)
        for level in range(size):
            _fill(sums, squares, heavy, before, losses, cuts[level], 0, columns, 0, columns)
            before, losses = losses, before
        last = columns
        for level in range(size - 1, -1, -1):
            first = cuts[level, last]
            weight = heavy[last] - heavy[first]
            if weight > 0:
                levels[row, level] = (sums[last] - sums[first]) / weight
            else:  # nothing is left for it
                levels[row, level] = values[row, min(first, columns - 1)]
            last = first


@njit(parallel=True, cache=True)
def sweep_levels(values, targets, levels, feedback, keep, codes, errors):
    """
    Round a block of columns to the levels of their rows, one after the other, and let the later ones make up for the errors
    of the earlier.

    Args:
        values (`ndarray`): float32 `(columns, rows)`: the targets with the feedback of all columns before the block; used
            up.
        targets (`ndarray`): float32 `(columns, rows)`: what should be met.
        levels (`ndarray`): float32 `(size, rows)`, ascending.
        feedback (`ndarray`): float32 `(columns, columns)`: how the error of one is fed to those after it.
        keep (`ndarray`): bool `(columns, rows)`: the others get the level that is zero; of no size, all are kept.
        codes (`ndarray`): uint8 `(columns, rows)`, written: the number of the level.
        errors (`ndarray`): float32 `(columns, rows)`, written.
    """
    columns, rows = values.shape
    size, sparse = len(levels), len(keep) > 0
    for part in prange((rows + ROWS - 1) // ROWS):
        start, stop = part * ROWS, min((part + 1) * ROWS, rows)
        for j in range(columns):
            for before in range(j):
                factor = feedback[before, j]
                for i in range(start, stop):
                    values[j, i] += factor * errors[before, i]
            for i in range(start, stop):
                value, code = values[j, i], 0
                for level in range(1, size):
                    code += value > (levels[level - 1, i] + levels[level, i]) * np.float32(0.5)
                if sparse and not keep[j, i]:
                    for level in range(size):
                        if levels[level, i] == 0:
                            code = level
                codes[j, i] = code
                errors[j, i] = targets[j, i] - levels[code, i]
