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
not fit goes out as a word of 16 bits. As many states as there are lanes take turns, which a processor works on at the
same time, and share one stream of words (Giesen, arXiv 1402.3392).
"""

import numpy as np
from numba import njit, prange


PRECISION = 12  # bits of the frequencies' sum
LANES = 8
LOWEST = 1 << 16  # of a state between symbols
STATES = 2 * LANES  # words in which a chunk's states lie


@njit(cache=True, parallel=True)
def encode_chunks(symbols, bounds, frequencies, starts, words, counts):
    """
    Encode chunks, each by itself, so that each may be decoded by itself.

    Args:
        symbols (`ndarray`): uint8 `(n,)`.
        bounds (`ndarray`): int64 `(chunks + 1,)`: where each chunk begins and ends.
        frequencies (`ndarray`): uint32 `(256,)`; those of the symbols that occur are not zero.
        starts (`ndarray`): uint32 `(256,)`: the sums of the frequencies before each.
        words (`ndarray`): uint16 `(chunks, most)`, written from the back; `most` is [`STATES`] plus the symbols of a chunk.
        counts (`ndarray`): int64 `(chunks,)`, written: how many words there are.
    """
    for chunk in prange(len(counts)):
        first, last = bounds[chunk], bounds[chunk + 1]
        states = np.full(LANES, LOWEST, np.uint64)
        place = words.shape[1]
        for i in range(last - 1, first - 1, -1):
            lane, symbol = (i - first) % LANES, symbols[i]
            x, frequency = states[lane], np.uint64(frequencies[symbol])
            if x >= frequency << np.uint64(32 - PRECISION):
                place -= 1
                words[chunk, place] = x & np.uint64(0xFFFF)
                x >>= np.uint64(16)
            states[lane] = ((x // frequency) << np.uint64(PRECISION)) + x % frequency + np.uint64(starts[symbol])
        for lane in range(LANES - 1, -1, -1):
            place -= 2
            words[chunk, place] = states[lane] & np.uint64(0xFFFF)
            words[chunk, place + 1] = states[lane] >> np.uint64(16)
        counts[chunk] = words.shape[1] - place


@njit(cache=True, parallel=True)
def decode_chunks(words, offsets, table, symbols, bounds, whole):
    """
    Decode chunks.

    Args:
        words (`ndarray`): uint16 `(n,)`.
        offsets (`ndarray`): int64 `(chunks + 1,)`: where the words of each chunk begin and end.
        table (`ndarray`): uint32 `(2^PRECISION,)`: for every remainder its symbol in the upper 8 bits, the symbol's
            frequency less one in 12, and the remainder less where the symbol begins in the lower 12.
        symbols (`ndarray`): uint8 `(n,)`, written.
        bounds (`ndarray`): int64 `(chunks + 1,)`: where the symbols of each chunk begin and end.
        whole (`ndarray`): bool `(chunks,)`, written: whether a chunk's words end as they have to.
    """
    for chunk in prange(len(whole)):
        whole[chunk] = _decode(
            words[offsets[chunk] : offsets[chunk + 1]], table, symbols[bounds[chunk] : bounds[chunk + 1]]
        )


@njit(cache=True, inline="always")
def _step(x, table, words, place):
    """One symbol: itself, the state behind it, and how many words have been read."""
    entry = table[x & np.uint32(0xFFF)]
    x = ((entry >> np.uint32(12) & np.uint32(0xFFF)) + np.uint32(1)) * (x >> np.uint32(12)) + (
        entry & np.uint32(0xFFF)
    )
    refilled = x << np.uint32(16) | np.uint32(words[place])
    low = x < np.uint32(LOWEST)
    return np.uint8(entry >> np.uint32(24)), np.uint32(refilled if low else x), place + np.int64(low)


@njit(cache=True)
def _decode(words, table, symbols):
    if len(words) < STATES:
        return False
    padded = np.zeros(LANES, np.uint16)
    states = np.empty(LANES, np.uint32)
    for lane in range(LANES):
        states[lane] = np.uint32(words[2 * lane]) | np.uint32(words[2 * lane + 1]) << np.uint32(16)
    a, b, c, d, e, f, g, h = states
    i, place, count = 0, np.int64(STATES), len(symbols)
    while i + LANES <= count and place + LANES <= len(words):
        symbols[i], a, place = _step(a, table, words, place)
        symbols[i + 1], b, place = _step(b, table, words, place)
        symbols[i + 2], c, place = _step(c, table, words, place)
        symbols[i + 3], d, place = _step(d, table, words, place)
        symbols[i + 4], e, place = _step(e, table, words, place)
        symbols[i + 5], f, place = _step(f, table, words, place)
        symbols[i + 6], g, place = _step(g, table, words, place)
        symbols[i + 7], h, place = _step(h, table, words, place)
        i += LANES
    states[0], states[1], states[2], states[3] = a, b, c, d
    states[4], states[5], states[6], states[7] = e, f, g, h
    while i < count:  # the last ones, where the words might end
        if place > len(words):
            return False
        read, last = (words, place) if place < len(words) else (padded, np.int64(0))
        symbols[i], states[i % LANES], after = _step(states[i % LANES], table, read, last)
        place += after - last
        i += 1
    return place == len(words) and (states == LOWEST).all()
