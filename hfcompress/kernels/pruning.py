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
Pruning whose error is made up for along rows and columns, one group of entries after the other.

Laid out as [`hfcompress.kernels.rounding`]: columns of the weight as rows, blocks of rows shared among the cores.
"""

import numpy as np
from numba import njit, prange


@njit(fastmath=True, cache=True)
def eliminate(values, inverse, removed, count, best_values, trial_values, trial_inverse, trial_removed):
    """
    Set `count` of a few values to zero so that the quadratic form `(v - w)^T K (v - w)` of what is left is least, the
    rest making up for them (Optimal Brain Surgeon, Hassibi and Stork 1993): one after the other, each time the one
    whose removal costs least, begun from every value in turn. Of two it finds the best pair.

    Args:
        values (`ndarray`): float32 `(m,)`: `v`, overwritten by the best `w`.
        inverse (`ndarray`): float32 `(m, m)`: `K^-1`.
        removed (`ndarray`): bool `(m,)`, written: which are zero.
        count (`int`): how many.
        best_values, trial_values, trial_inverse, trial_removed: room to work in.

    Returns:
        `float`: what it costs.
    """
    size = len(values)
    least = np.inf
    for first in range(size if count > 1 else 1):
        cost = np.float32(0)
        trial_removed[:] = False
        for i in range(size):
            trial_values[i] = values[i]
            for j in range(size):
                trial_inverse[i, j] = inverse[i, j]
        for turn in range(count):
            pick, price = -1, np.inf
            for i in range(size):
                if not trial_removed[i] and (turn > 0 or count == 1 or i == first):
                    own = trial_values[i] * trial_values[i] / trial_inverse[i, i]
                    if own < price or pick < 0:
                        pick, price = i, own
            cost += price
            pivot = trial_inverse[pick, pick]
            ratio = trial_values[pick] / pivot
            for i in range(size):
                trial_values[i] -= trial_inverse[i, pick] * ratio
            trial_removed[pick] = True
            if turn + 1 < count:
                for i in range(size):
                    if i != pick:
                        share = trial_inverse[i, pick] / pivot
                        for j in range(size):
                            trial_inverse[i, j] -= share * trial_inverse[pick, j]
            for i in range(size):
                if trial_removed[i]:
                    trial_values[i] = 0
        if cost < least:
            least = cost
            for i in range(size):
                best_values[i] = trial_values[i]
                removed[i] = trial_removed[i]
    for i in range(size):
        values[i] = best_values[i]
    return least


@njit(parallel=True, fastmath=True, cache=True)
def prune_columns(values, targets, across, down, starts, stops, inverses, zeros, keep, kept, carried):
    """
    Prune a few columns, each row after row.

    Args:
        values (`ndarray`): float32 `(columns, rows)`: the targets with the feedback of all columns before these; used
            up.
        targets (`ndarray`): float32 `(columns, rows)`: what should be met.
        across (`ndarray`): float32 `(columns, columns)`: how the error of one column is fed to those after it.
        down (`ndarray`): float32 `(rows, block)`: how the error of a row is fed to those after it in its block.
        starts, stops (`ndarray`): int64 `(blocks,)`: the blocks of rows.
        inverses (`ndarray`): float32 `(groups, m, m)`: for each group of `m` columns what
            [`hfcompress.solvers.sparsegpt.group_inverses`] gives.
        zeros (`int`): entries of each group to be set to zero; 0 to take `keep` as it is given, in groups of one.
        keep (`ndarray`): bool `(columns, rows)`, written where `zeros` is given: which entries stay.
        kept (`ndarray`): float32 `(columns, rows)`, written: the values.
        carried (`ndarray`): float32 `(columns, rows)`, written: each error plus what it receives from the rows above.
    """
    size = inverses.shape[1]
    for block in prange(len(starts)):
        start, stop = starts[block], stops[block]
        above = np.empty((size, stop - start), np.float32)
        own, best, trial = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
        room = np.empty((size, size), np.float32)
        removed, tried = np.empty(size, np.bool_), np.empty(size, np.bool_)
        for group in range(len(inverses)):
            first = group * size
            for j in range(size):
                for before in range(first):
                    factor = across[before, first + j]
                    for i in range(start, stop):
                        values[first + j, i] += factor * carried[before, i]
            above[:] = 0
            for i in range(start, stop):
                if zeros > 0:
                    for j in range(size):
                        own[j] = values[first + j, i] + above[j, i - start]
                        for before in range(j):  # as if all of the group stayed
                            error = targets[first + before, i] - own[before]
                            own[j] += across[first + before, first + j] * (above[before, i - start] + error)
                    eliminate(own, inverses[group], removed, zeros, best, trial, room, tried)
                    for j in range(size):
                        keep[first + j, i] = not removed[j]
                else:
                    own[0] = values[first, i] + above[0, i - start] if keep[first, i] else np.float32(0)
                for j in range(size):
                    value = own[j]
                    kept[first + j, i] = value
                    error = targets[first + j, i] - value
                    carried[first + j, i] = above[j, i - start] + error
                    for k in range(i + 1 - start, stop - start):
                        above[j, k] += down[i, k] * error


@njit(parallel=True, fastmath=True, cache=True)
def descend_groups(slopes, gram, curvature, inverses, starts, stops, zeros, kept, moved):
    """
    Choose the entries and the values of groups of columns anew, one group of a row after the other, the others held.

    Args:
        slopes (`ndarray`): float32 `(columns, rows)`: half the objective's derivatives by the weight, with the sign of
            descent, all moves of other columns taken in; used up.
        gram (`ndarray`): float32 `(columns, columns)`: of the inputs, damped.
        curvature (`ndarray`): float32 `(rows, block)`: of the outputs, damped; each row's own block.
        inverses (`ndarray`): float32 `(groups, m, m)`: of the Gram matrix's blocks along its diagonal.
        starts, stops (`ndarray`): int64 `(blocks,)`: the blocks of rows.
        zeros (`int`): entries of each group that are zero.
        kept (`ndarray`): float32 `(columns, rows)`: the values, changed.
        moved (`ndarray`): float32 `(columns, rows)`, zeros on entry; written: curvature times the change in value.
    """
    size = inverses.shape[1]
    for block in prange(len(starts)):
        start, stop = starts[block], stops[block]
        own, best, trial = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
        change, bent = np.empty(size, np.float32), np.empty(size, np.float32)
        room = np.empty((size, size), np.float32)
        removed, tried = np.empty(size, np.bool_), np.empty(size, np.bool_)
        for group in range(len(inverses)):
            first = group * size
            for j in range(size):
                for before in range(first):
                    factor = gram[before, first + j]
                    for i in range(start, stop):
                        slopes[first + j, i] -= factor * moved[before, i]
            for i in range(start, stop):
                worth = curvature[i, i - start]
                for j in range(size):
                    step = np.float32(0)
                    for k in range(size):
                        step += inverses[group, j, k] * slopes[first + k, i]
                    own[j] = kept[first + j, i] + step / worth
                eliminate(own, inverses[group], removed, zeros, best, trial, room, tried)
                for j in range(size):
                    change[j] = own[j] - kept[first + j, i]
                    kept[first + j, i] = own[j]
                for j in range(size):
                    bent[j] = 0
                    for k in range(size):
                        bent[j] += gram[first + j, first + k] * change[k]
                for j in range(size):
                    for k in range(stop - start):
                        slopes[first + j, start + k] -= curvature[i, k] * bent[j]
                        moved[first + j, start + k] += curvature[i, k] * change[j]
