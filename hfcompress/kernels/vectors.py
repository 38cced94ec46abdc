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
Inner loops of vector quantization: rounding to vectors with error fed back along rows and columns, and moving one number
after the other to where the objective is least.

The vectors of one place in a row are rounded together, place after place and row after row; blocks of rows that share no
curvature are independent, and are shared among the cores. Distances are squares in a space in which an error of the place
costs what its square is (`rooted`), so that the nearest is looked for by a few products with all vectors of a table.
"""

import numpy as np
from numba import njit, prange


@njit(fastmath=True, cache=True)
def _nearest(point, rooted, squares, beam, costs, left, totals, paths, spare):
    """
    The numbers of the vectors, one of each table, whose sum is nearest to a point: in `paths[0]`. Exact for one table; for
    more, `beam` sums are followed from table to table.

    Args:
        point (`ndarray`): float32 `(length,)`.
        rooted (`ndarray`): float32 `(tables, length, entries)`.
        squares (`ndarray`): float32 `(tables, entries)`: of the vectors, and what choosing them costs besides.
        beam (`int`): sums that are followed.
        costs, left, totals, paths, spare (`ndarray`): room to work in: float32 `(entries,)`, `(2, beam, length)`,
            `(2, beam)`, and int64 `(beam, tables)` twice.
    """
    tables, length, entries = rooted.shape
    count, now = 1, 0
    left[0, 0, :] = point
    totals[0, 0] = 0.0
    for table in range(tables):
        room = 1 if table == tables - 1 else beam
        found = 0
        other = 1 - now
        for sum_ in range(count):
            for e in range(entries):
                costs[e] = squares[table, e] + totals[now, sum_]
            for t in range(length):
                twice = -2 * left[now, sum_, t]
                for e in range(entries):
                    costs[e] += twice * rooted[table, t, e]
            if room == 1:
                least = costs[0]
                for e in range(entries):
                    least = min(least, costs[e])
                if found == 0 or least < totals[other, 0]:
                    best = 0
                    while best < entries - 1 and costs[best] != least:
                        best += 1
                    found = 1
                    totals[other, 0] = least
                    spare[0, :table] = paths[sum_, :table]
                    spare[0, table] = best
                continue
            for e in range(entries):
                if found == room and not costs[e] < totals[other, room - 1]:
                    continue
                place = found if found < room else room - 1
                found = min(found + 1, room)
                while place > 0 and costs[e] < totals[other, place - 1]:
                    totals[other, place] = totals[other, place - 1]
                    left[other, place] = left[other, place - 1]
                    spare[place] = spare[place - 1]
                    place -= 1
                totals[other, place] = costs[e]
                for t in range(length):
                    left[other, place, t] = left[now, sum_, t] - rooted[table, t, e]
                spare[place, :table] = paths[sum_, :table]
                spare[place, table] = e
        paths[:found] = spare[:found]
        count, now = found, other


@njit(fastmath=True, cache=True)
def _priced(squares, prices, scale, worth, out):
    """Squares with what choosing each vector costs besides, both in units of a row's squares."""
    unit = max(worth * scale * scale, np.float32(1e-30))
    for table in range(len(squares)):
        for e in range(squares.shape[1]):
            out[table, e] = squares[table, e] + prices[table, e] / unit


@njit(parallel=True, fastmath=True, cache=True)
def round_vectors(
    fed,
    targets,
    scales,
    worth,
    vectors,
    book,
    roots,
    spreads,
    prices,
    across,
    down,
    starts,
    stops,
    keep,
    beam,
    codes,
    carried,
):
    """
    Round a few columns, place after place, each row after row.

    Args:
        fed (`ndarray`): float32 `(rows, columns)`: the feedback of all columns before these.
        targets (`ndarray`): float32 `(rows, columns)`: what should be met.
        scales (`ndarray`): float32 `(rows,)`.
        worth (`ndarray`): float32 `(rows,)`: what a squared error of each costs.
        vectors (`ndarray`): float32 `(books, tables, entries, length)`.
        book (`ndarray`): int64 `(rows,)`: of each row.
        roots (`ndarray`): float32 `(places, length, length)`: what turns an error into one whose square is its cost.
        spreads (`ndarray`): float32 `(columns,)`: likewise for what is fed from before the place.
        prices (`ndarray`): float32 `(books, tables, entries)`: what choosing a vector costs besides.
        across (`ndarray`): float32 `(columns, columns)`: how the error of one column is fed to those after it; transposed.
        down (`ndarray`): float32 `(rows, block)`: how the error of a row is fed to those after it in its block.
        starts, stops (`ndarray`): int64 `(blocks,)`: the blocks of rows.
        keep (`ndarray`): bool `(rows, columns)`, for vectors of one weight: the others get vector 0; of no size, all are
            kept.
        beam (`int`): sums that are followed from table to table.
        codes (`ndarray`): uint8 or int32 `(rows, places, tables)`, written.
        carried (`ndarray`): float32 `(rows, columns)`, written: each error plus what it receives from the rows above.
    """
    places, length, _ = roots.shape
    books, tables, entries, _ = vectors.shape
    rooted = np.empty((places, books, tables, length, entries), np.float32)
    squares = np.empty((places, books, tables, entries), np.float32)
    for place in prange(places):
        for b in range(books):
            _rooted(vectors[b], roots[place], rooted[place, b], squares[place, b])
    for block in prange(len(starts)):
        start, stop = starts[block], stops[block]
        above = np.empty((length, stop - start), np.float32)
        costs, own = np.empty(entries, np.float32), np.empty((tables, entries), np.float32)
        left, totals = np.empty((2, beam, length), np.float32), np.empty((2, beam), np.float32)
        paths, spare = np.zeros((beam, tables), np.int64), np.zeros((beam, tables), np.int64)
        point = np.empty(length, np.float32)
        for place in range(places):
            first = place * length
            above[:] = 0
            for i in range(start, stop):
                for t in range(length):
                    more = fed[i, first + t]
                    for before in range(first):
                        more += carried[i, before] * across[first + t, before]
                    total = more * spreads[first + t]
                    for other in range(length):
                        total += (targets[i, first + other] + above[other, i - start]) * roots[place, other, t]
                    point[t] = total / scales[i]
                if keep.size > 0 and not keep[i, first]:
                    paths[0, :] = 0
                else:
                    _priced(squares[place, book[i]], prices[book[i]], scales[i], worth[i], own)
                    _nearest(point, rooted[place, book[i]], own, beam, costs, left, totals, paths, spare)
                for table in range(tables):
                    codes[i, place, table] = paths[0, table]
                for t in range(length):
                    value = np.float32(0)
                    for table in range(tables):
                        value += vectors[book[i], table, paths[0, table], t]
                    error = targets[i, first + t] - value * scales[i]
                    carried[i, first + t] = above[t, i - start] + error
                    for k in range(i + 1 - start, stop - start):
                        above[t, k] += down[i, k] * error


@njit(parallel=True, fastmath=True, cache=True)
def descend_vectors(
    slopes, scales, vectors, book, roots, inverses, prices, gram, curvature, starts, stops, keep, beam, codes, moved
):
    """
    Move the numbers of a few columns to where the objective is least, one place after the other, the others held.

    Args:
        slopes (`ndarray`): float32 `(rows, columns)`: half the objective's derivatives by the rounded weight, with the sign
            of descent, all moves of other columns taken in; used up.
        scales (`ndarray`): float32 `(rows,)`.
        vectors (`ndarray`): float32 `(books, tables, entries, length)`.
        book (`ndarray`): int64 `(rows,)`: of each row.
        roots (`ndarray`): float32 `(places, length, length)`: `L` with `L L^T` the place's part of `gram`.
        inverses (`ndarray`): float32 `(places, length, length)`: of these.
        prices (`ndarray`): float32 `(books, tables, entries)`: what choosing a vector costs besides.
        gram (`ndarray`): float32 `(columns, columns)`: of the inputs, damped.
        curvature (`ndarray`): float32 `(rows, block)`: of the outputs, damped; each row's own block.
        starts, stops (`ndarray`): int64 `(blocks,)`: the blocks of rows.
        keep (`ndarray`): bool `(rows, columns)`: as in [`round_vectors`].
        beam (`int`): likewise.
        codes (`ndarray`): uint8 or int32 `(rows, places, tables)`, changed.
        moved (`ndarray`): float32 `(rows, columns)`, zeros on entry; written: curvature times the change in value.
    """
    places, length, _ = roots.shape
    books, tables, entries, _ = vectors.shape
    rooted = np.empty((places, books, tables, length, entries), np.float32)
    squares = np.empty((places, books, tables, entries), np.float32)
    for place in prange(places):
        for b in range(books):
            _rooted(vectors[b], roots[place], rooted[place, b], squares[place, b])
    for block in prange(len(starts)):
        start, stop = starts[block], stops[block]
        change, pushed = np.empty(length, np.float32), np.empty((length, stop - start), np.float32)
        costs, own = np.empty(entries, np.float32), np.empty((tables, entries), np.float32)
        left, totals = np.empty((2, beam, length), np.float32), np.empty((2, beam), np.float32)
        paths, spare = np.zeros((beam, tables), np.int64), np.zeros((beam, tables), np.int64)
        point = np.empty(length, np.float32)
        for place in range(places):
            first = place * length
            pushed[:] = 0
            for i in range(start, stop):
                if keep.size > 0 and not keep[i, first]:
                    continue
                for t in range(length):
                    slope = slopes[i, first + t]
                    for before in range(first):
                        slope -= moved[i, before] * gram[first + t, before]
                    for other in range(length):
                        slope -= pushed[other, i - start] * gram[first + t, first + other]
                    slopes[i, first + t] = slope
                worth = curvature[i, i - start]
                for t in range(length):  # the value at hand, and how far from it the least lies
                    total = np.float32(0)
                    for other in range(length):
                        value = np.float32(0)
                        for table in range(tables):
                            value += vectors[book[i], table, codes[i, place, table], other]
                        total += value * roots[place, other, t]
                        total += slopes[i, first + other] * inverses[place, t, other] / (worth * scales[i])
                    point[t] = total
                _priced(squares[place, book[i]], prices[book[i]], scales[i], worth, own)
                at_hand = _cost_of(point, rooted[place, book[i]], own, codes[i, place])
                _nearest(point, rooted[place, book[i]], own, beam, costs, left, totals, paths, spare)
                for table in range(tables):
                    if paths[0, table] != codes[i, place, table]:
                        break
                else:
                    continue
                if not _cost_of(point, rooted[place, book[i]], own, paths[0]) < at_hand:
                    continue
                for t in range(length):
                    value = np.float32(0)
                    for table in range(tables):
                        value += (
                            vectors[book[i], table, paths[0, table], t]
                            - vectors[book[i], table, codes[i, place, table], t]
                        )
                    change[t] = value * scales[i]
                for table in range(tables):
                    codes[i, place, table] = paths[0, table]
                for t in range(length):
                    for k in range(stop - start):
                        pushed[t, k] += curvature[i, k] * change[t]
            for k in range(stop - start):
                for t in range(length):
                    moved[start + k, first + t] = pushed[t, k]


@njit(fastmath=True, cache=True)
def _rooted(vectors, root, rooted, squares):
    """The vectors of all tables times the root of a place, and their squares."""
    tables, entries, length = vectors.shape
    squares[:] = 0
    for table in range(tables):
        for t in range(length):
            for e in range(entries):
                total = np.float32(0)
                for other in range(length):
                    total += vectors[table, e, other] * root[other, t]
                rooted[table, t, e] = total
                squares[table, e] += total * total


@njit(fastmath=True, cache=True)
def _cost_of(point, rooted, squares, numbers):
    """What the sum of the vectors with these numbers costs, but for what is the same for all."""
    tables, length, _ = rooted.shape
    cost = np.float32(0)
    for table in range(tables):
        own = np.float32(0)
        for t in range(length):
            own += rooted[table, t, numbers[table]] * rooted[table, t, numbers[table]]
        cost += squares[table, numbers[table]] - own
    for t in range(length):
        total = point[t]
        for table in range(tables):
            total -= rooted[table, t, numbers[table]]
        cost += total * total
    return cost
