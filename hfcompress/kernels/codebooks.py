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
Inner loops of codebooks: the best levels for the values of a row, rounding to them with feedback, and moving codes to better
ones.

The reference beside the first is [`hfcompress.solvers.codebook.Levels`]'s own objective over all ways to cut a few values;
those of the others are [`hfcompress.kernels.rounding`] with levels in place of a grid.
"""

import numpy as np
from numba import njit, prange


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


@njit(fastmath=True, cache=True)
def _nearest(value, levels):
    """The number of the level nearest to a value."""
    best, least = 0, abs(value - levels[0])
    for level in range(1, len(levels)):
        distance = abs(value - levels[level])
        if distance < least:
            best, least = level, distance
    return best


@njit(parallel=True, fastmath=True, cache=True)
def round_levels(fed, targets, levels, group, across, down, starts, stops, keep, codes, carried):
    """
    Round a few columns to the levels of their rows and groups, one after the other, each row after row, with errors fed back
    along both.

    Args:
        fed (`ndarray`): float32 `(rows, columns)`: the feedback of all columns before these.
        targets (`ndarray`): float32 `(rows, columns)`: what should be met.
        levels (`ndarray`): float32 `(rows, groups, size)`.
        group (`ndarray`): int64 `(columns,)`: the group of each.
        across (`ndarray`): float32 `(columns, columns)`: how the errors of others are fed to each.
        down (`ndarray`): float32 `(rows, block)`: how the error of a row is fed to those after it in its block.
        starts, stops (`ndarray`): int64 `(blocks,)`: the blocks of rows.
        keep (`ndarray`): bool `(rows, columns)`: the others get the level that is zero; of no size, all are kept.
        codes (`ndarray`): uint8 `(rows, columns)`, written.
        carried (`ndarray`): float32 `(rows, columns)`, written: each error plus what it receives from the rows above.
    """
    for block in prange(len(starts)):
        start, stop = starts[block], stops[block]
        above = np.empty(stop - start, np.float32)
        for j in range(targets.shape[1]):
            above[:] = 0
            for i in range(start, stop):
                value = targets[i, j] + fed[i, j] + above[i - start]
                for before in range(j):
                    value += carried[i, before] * across[j, before]
                if keep.size > 0 and not keep[i, j]:
                    value = np.float32(0)
                code = _nearest(value, levels[i, group[j]])
                error = targets[i, j] - levels[i, group[j], code]
                codes[i, j] = code
                carried[i, j] = above[i - start] + error
                for k in range(i + 1 - start, stop - start):
                    above[k] += down[i, k] * error


@njit(parallel=True, fastmath=True, cache=True)
def descend_levels(slopes, levels, group, gram, curvature, starts, stops, keep, codes, moved):
    """
    Move the codes of a few columns to where the objective is least, one after the other, the others held.

    Args:
        slopes (`ndarray`): float32 `(rows, columns)`: half the objective's derivatives by the rounded weight, with the sign
            of descent, all moves of other columns taken in.
        levels (`ndarray`): float32 `(rows, groups, size)`.
        group (`ndarray`): int64 `(columns,)`: the group of each.
        gram (`ndarray`): float32 `(columns, columns)`: of the inputs, damped.
        curvature (`ndarray`): float32 `(rows, block)`: of the outputs, damped; each row's own block.
        starts, stops (`ndarray`): int64 `(blocks,)`: the blocks of rows.
        keep (`ndarray`): bool `(rows, columns)`: the others stay; of no size, all are moved.
        codes (`ndarray`): uint8 `(rows, columns)`, changed.
        moved (`ndarray`): float32 `(rows, columns)`, written: curvature times the change in value.
    """
    for block in prange(len(starts)):
        start, stop = starts[block], stops[block]
        pushed = np.empty(stop - start, np.float32)
        for j in range(slopes.shape[1]):
            pushed[:] = 0
            for i in range(start, stop):
                if keep.size > 0 and not keep[i, j]:
                    continue
                slope = slopes[i, j] - pushed[i - start] * gram[j, j]
                for before in range(j):
                    slope -= moved[i, before] * gram[j, before]
                own = levels[i, group[j]]
                old = own[codes[i, j]]
                code = _nearest(old + slope / (curvature[i, i - start] * gram[j, j]), own)
                if own[code] != old:
                    codes[i, j] = code
                    for k in range(stop - start):
                        pushed[k] += curvature[i, k] * (own[code] - old)
            for k in range(stop - start):
                moved[start + k, j] = pushed[k]
