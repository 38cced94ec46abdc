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
Vectors whose numbers are chosen by what they take to store, too (entropy-constrained vector quantization; Chou, Lookabaugh and
Gray 1989): what is made small is the objective plus a price for every bit, each number taking as many as an entropy coder
would spend on it. The price at which the bits are those that are asked for is found on the way: where rounding errors are
evenly spread, it is proportional to `4^-rate`.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from hfcompress.solvers.codebook import stored
from hfcompress.solvers.entropy import SYMBOLS, bits_of, classes_of, counted, index_bits
from hfcompress.solvers.grid import shortest_first
from hfcompress.solvers.objective import Objective
from hfcompress.solvers.vectors import DESCENTS, Vectors, descend, refitted, rescaled, sweep


SWEEPS = 14  # in the first half of which the rate comes down to where it should be
ADJUSTMENTS = 8  # of the price, at the end
CLOSE = 0.005  # of the rate
TABLE_BITS = 16  # of a number in a table, and of a row's scale and class
UNUSED = 0.1  # times that a vector is counted which nothing is near
MAGNITUDES = torch.arange(SYMBOLS).float()


def ranked(found: Vectors) -> Tensor:
    """The numbers as they are stored, the shortest vectors of each table first: `(out_features, places * tables)`."""
    _, codes = shortest_first(found.vectors, found.codes, found.book)
    return codes.flatten(1)


def rate(found: Vectors) -> float:
    """Bits per weight of all that is stored, the numbers entropy-coded."""
    symbols = ranked(found)
    bits = bits_of(counted(symbols, classes_of(symbols, MAGNITUDES))) + index_bits(symbols.shape)
    bits += TABLE_BITS * (found.vectors.numel() + 2 * len(found.scales))
    return bits / (found.codes[..., 0].numel() * found.vectors.shape[3])


def code_lengths(found: Vectors) -> Tensor:
    """Bits that each number takes: float32 `(books, tables, entries)`."""
    books, tables, entries, _ = found.vectors.shape
    counts = torch.bincount(found.numbers.flatten(), minlength=books * tables * entries)
    shares = counts.view(books, tables, entries) + UNUSED
    return -(shares / shares.sum(-1, keepdim=True)).log2()


def constrained(objective: Objective, found: Vectors, dtype: torch.dtype, rounds: int, bits: float) -> Vectors:
    """
    Vectors, scales and numbers that take `bits` a weight, everything counted.

    Args:
        objective (`Objective`): of the linear.
        found (`Vectors`): to begin with; they take more.
        dtype (`torch.dtype`): what scales and vectors are stored in.
        rounds (`int`): times that vectors, scales and numbers are improved in turn.
        bits (`float`): per weight.
    """
    begun = now = rate(found)
    price = 2 * math.log(2) * objective.loss(found.values()) / objective.target.numel()
    for number in range(SWEEPS):
        left = max(0.0, 1 - 2 * (number + 1) / SWEEPS)
        price *= 4 ** (now - bits - left * (begun - bits))
        prices = price * code_lengths(found)
        found = replace(found, codes=sweep(objective, found.scales, found.vectors, found.book, prices))
        found = replace(found, vectors=stored(refitted(objective, found), dtype))
        now = rate(found)
    for _ in range(rounds):
        price *= 4 ** (now - bits)
        found = replace(found, vectors=stored(refitted(objective, found), dtype))
        found = replace(found, scales=stored(rescaled(objective, found), dtype))
        for _ in range(DESCENTS):
            found = replace(found, codes=descend(objective, found, price * code_lengths(found)))
        now = rate(found)
    for number in range(ADJUSTMENTS):
        if abs(now - bits) < CLOSE * bits:
            break
        price *= 4 ** ((number + 3) * (now - bits))
        found = replace(found, codes=descend(objective, found, price * code_lengths(found)))
        now = rate(found)
    return found
