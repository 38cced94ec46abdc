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
The inner loops of entropy coding by range asymmetric numeral systems (rANS; Duda, arXiv 1311.2540).

A state `x` is an integer of 32 bits that stands for all symbols behind it. With frequencies that sum to
2^[`PRECISION`], symbol `s` of frequency `f` that begins at `c` takes it to `(x // f) 2^PRECISION + x % f + c`; what does
not fit goes out as a word of 16 bits. As many states as there are lanes take turns along a row, which a processor works
on at the same time, and share one stream of words (Giesen, arXiv 1402.3392). Every symbol has one of several tables of
frequencies, told by its row and its column.
"""

import numpy as np
from numba import njit, prange


PRECISION = 12  # bits of the frequencies' sum
LANES = 8
LOWEST = 1 << 16  # of a state between symbols
STATES = 2 * LANES  # words in which a chunk's states lie


@njit(cache=True)
def count_symbols(symbols, row_classes, column_classes, counts):
    """
    Args:
        symbols (`ndarray`): uint8 `(rows, columns)`.
        row_classes, column_classes (`ndarray`): uint8 `(rows,)` and `(columns,)`: their sum is the number of the table.
        counts (`ndarray`): int64 `(tables, 256)`, added to: how often each symbol occurs.
    """
    for i in range(len(symbols)):
        for j in range(symbols.shape[1]):
            counts[np.int64(row_classes[i]) + np.int64(column_classes[j]), symbols[i, j]] += 1


@njit(cache=True, parallel=True)
def encode_chunks(symbols, bounds, row_classes, column_classes, frequencies, starts, words, counts):
    """
    Encode chunks, each by itself, so that each may be decoded by itself.

    Args:
        symbols (`ndarray`): uint8 `(rows, columns)`.
        bounds (`ndarray`): int64 `(chunks + 1,)`: the rows at which each chunk begins and ends.
        row_classes, column_classes (`ndarray`): uint8 `(rows,)` and `(columns,)`: their sum is the number of the table.
        frequencies (`ndarray`): uint32 `(tables, 256)`; those of the symbols that occur are not zero.
        starts (`ndarray`): uint32 `(tables, 256)`: the sums of the frequencies before each.
        words (`ndarray`): uint16 `(chunks, most)`, written from the back; `most` is [`STATES`] plus the symbols of a chunk.
        counts (`ndarray`): int64 `(chunks,)`, written: how many words there are.
    """
    for chunk in prange(len(counts)):
        states = np.full(LANES, LOWEST, np.uint64)
        place = words.shape[1]
        for i in range(bounds[chunk + 1] - 1, bounds[chunk] - 1, -1):
            for j in range(symbols.shape[1] - 1, -1, -1):
                lane, symbol = j % LANES, symbols[i, j]
                table = np.int64(row_classes[i]) + np.int64(column_classes[j])
                x, frequency = states[lane], np.uint64(frequencies[table, symbol])
                if x >= frequency << np.uint64(32 - PRECISION):
                    place -= 1
                    words[chunk, place] = x & np.uint64(0xFFFF)
                    x >>= np.uint64(16)
                begins = np.uint64(starts[table, symbol])
                states[lane] = ((x // frequency) << np.uint64(PRECISION)) + x % frequency + begins
        for lane in range(LANES - 1, -1, -1):
            place -= 2
            words[chunk, place] = states[lane] & np.uint64(0xFFFF)
            words[chunk, place + 1] = states[lane] >> np.uint64(16)
        counts[chunk] = words.shape[1] - place


@njit(cache=True)
def fill_tables(stored, table):
    """
    The tables that [`decode_chunks`] looks up, of the frequencies as they are stored; whether these are such.

    Args:
        stored (`ndarray`): int64 `(sizes,)`: for one table after the other how many symbols it has, and their frequencies.
        table (`ndarray`): uint32 `(tables, 2^PRECISION)`, written; zeros on entry.
    """
    place = 0
    for number in range(len(table)):
        if place >= len(stored):
            return False
        symbols = stored[place]
        if symbols < 0 or symbols > 256 or place + 1 + symbols > len(stored):
            return False
        begins = 0
        for symbol in range(symbols):
            frequency = stored[place + 1 + symbol]
            if frequency < 0 or begins + frequency > 1 << PRECISION:
                return False
            for slot in range(frequency):
                entry = symbol << 24 | (frequency - 1) << 12 | slot
                table[number, begins + slot] = entry
            begins += frequency
        if begins != 1 << PRECISION and begins != 0:
            return False
        place += 1 + symbols
    return place == len(stored)


@njit(cache=True, parallel=True)
def decode_chunks(words, offsets, table, row_classes, column_classes, symbols, bounds, whole):
    """
    Decode chunks.

    Args:
        words (`ndarray`): uint16 `(n,)`.
        offsets (`ndarray`): int64 `(chunks + 1,)`: where the words of each chunk begin and end.
        table (`ndarray`): uint32 `(tables * 2^PRECISION,)`: for every remainder its symbol in the upper 8 bits, the
            symbol's frequency less one in 12, and the remainder less where the symbol begins in the lower 12.
        row_classes, column_classes (`ndarray`): int64 `(rows,)` and `(columns,)`: their sum is where the table begins.
        symbols (`ndarray`): uint8 `(rows, columns)`, written.
        bounds (`ndarray`): int64 `(chunks + 1,)`: the rows at which each chunk begins and ends.
        whole (`ndarray`): bool `(chunks,)`, written: whether a chunk's words end as they have to.
    """
    for chunk in prange(len(whole)):
        rows = slice(bounds[chunk], bounds[chunk + 1])
        own = words[offsets[chunk] : offsets[chunk + 1]]
        whole[chunk] = _decode(own, table, row_classes[rows], column_classes, symbols[rows])


@njit(cache=True, inline="always")
def _step(x, table, begins, words, place):
    """One symbol: itself, the state behind it, and how many words have been read."""
    entry = table[begins + np.int64(x & np.uint32(0xFFF))]
    x = ((entry >> np.uint32(12) & np.uint32(0xFFF)) + np.uint32(1)) * (x >> np.uint32(12)) + (
        entry & np.uint32(0xFFF)
    )
    refilled = x << np.uint32(16) | np.uint32(words[place])
    low = x < np.uint32(LOWEST)
    return np.uint8(entry >> np.uint32(24)), np.uint32(refilled if low else x), place + np.int64(low)


@njit(cache=True)
def _decode(words, table, row_classes, column_classes, symbols):
    if len(words) < STATES:
        return False
    padded = np.zeros(LANES, np.uint16)
    states = np.empty(LANES, np.uint32)
    for lane in range(LANES):
        states[lane] = np.uint32(words[2 * lane]) | np.uint32(words[2 * lane + 1]) << np.uint32(16)
    place, columns = np.int64(STATES), symbols.shape[1]
    for row in range(len(symbols)):
        found, at, j = symbols[row], row_classes[row], 0
        a, b, c, d, e, f, g, h = states
        while j + LANES <= columns and place + LANES <= len(words):
            found[j], a, place = _step(a, table, at + column_classes[j], words, place)
            found[j + 1], b, place = _step(b, table, at + column_classes[j + 1], words, place)
            found[j + 2], c, place = _step(c, table, at + column_classes[j + 2], words, place)
            found[j + 3], d, place = _step(d, table, at + column_classes[j + 3], words, place)
            found[j + 4], e, place = _step(e, table, at + column_classes[j + 4], words, place)
            found[j + 5], f, place = _step(f, table, at + column_classes[j + 5], words, place)
            found[j + 6], g, place = _step(g, table, at + column_classes[j + 6], words, place)
            found[j + 7], h, place = _step(h, table, at + column_classes[j + 7], words, place)
            j += LANES
        states[0], states[1], states[2], states[3] = a, b, c, d
        states[4], states[5], states[6], states[7] = e, f, g, h
        while j < columns:  # what is left of the row, and the last ones, where the words might end
            if place > len(words):
                return False
            lane = j % LANES
            read, last = (words, place) if place < len(words) else (padded, np.int64(0))
            found[j], states[lane], after = _step(states[lane], table, at + column_classes[j], read, last)
            place += after - last
            j += 1
    return place == len(words) and (states == LOWEST).all()
