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
Symbols in as many bits as they are worth: rANS with tables of frequencies, in chunks of rows that decode by themselves.

Which table a symbol has is told by the classes of its row and of its column, which add up, so that what is spread more
widely in some rows and columns than in others is coded there as such ([`classes_of`]).

A stream is three tensors, as they are stored: its words, where the words of every chunk begin, with a checksum of each,
and the frequencies.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hfcompress.errors import CheckpointError, InvalidValueError


SYMBOLS = 256
CHUNK = 1 << 16  # symbols that are decoded together, rounded down to whole rows
TOTAL = 1 << 12  # the sum of a table's frequencies
TABLES = 64  # at most
PER_OCTAVE = (1, 2, 4)  # classes, of which the cheapest are taken
NARROWEST = 2.0**-16  # spread of a row or column that is told from a narrower one, of the widest's


@dataclass(frozen=True)
class Classes:
    """
    Which table of frequencies symbols have: number `rows[i] + columns[j]`.

    Args:
        rows (`Tensor`): uint8 `(rows,)`.
        columns (`Tensor`): uint8 `(columns,)`.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def single(cls, shape: tuple[int, int] | torch.Size) -> "Classes":
        """One table for all."""
        return cls(torch.zeros(shape[0], dtype=torch.uint8), torch.zeros(shape[1], dtype=torch.uint8))

    @property
    def tables(self) -> int:
        """How many there are."""
        return int(self.rows.max()) + int(self.columns.max()) + 1


@dataclass(frozen=True)
class Stream:
    """
    Encoded symbols.

    Args:
        words (`Tensor`): uint16 `(words,)`.
        index (`Tensor`): int64 `(2, chunks)`: how many words each chunk has, and the CRC-32 of its words behind that of the
            table, of the classes and of what belongs to them.
        frequencies (`Tensor`): uint16 `(sizes,)`: for one table after the other how many symbols it has, and the
            frequencies of the symbols 0, 1, ..., which have the sum 4096; a table that nothing has is of none.
        classes (`Classes`): which table each symbol has.
    """

    words: Tensor
    index: Tensor
    frequencies: Tensor
    classes: Classes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors but the classes."""
        return self.words.nbytes + self.index.nbytes + self.frequencies.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """Of the symbols."""
        return len(self.classes.rows), len(self.classes.columns)


def entropy(counts: Tensor) -> float:
    """
    Bits per symbol that no code of single symbols can do without.

    Args:
        counts (`Tensor`): `(symbols,)`: how often each occurs.
    """
    shares = counts.double() / counts.sum()
    return -(shares * shares.clamp(min=1e-300).log2()).sum().item()


def frequencies_of(counts: Tensor) -> Tensor:
    """
    Whole numbers with the sum 4096 that cost the fewest bits, at least one for each symbol that occurs.

    Args:
        counts (`Tensor`): int64 `(symbols,)`, up to 256 of them, of which at least one is not zero.

    Returns:
        `Tensor`: int64 `(symbols,)`.
    """
    occurs = counts > 0
    shares = counts.double() * (TOTAL / counts.sum())
    found = torch.where(occurs, shares.floor().long().clamp(min=1), 0)
    left = TOTAL - int(found.sum())
    while True:
        # the bits that one more saves, and one less costs: exchanged until that gains nothing
        gains = torch.where(occurs, counts.double() * ((found + 1).double() / found.clamp(min=1)).log2(), -1.0)
        costs = counts.double() * (found.double() / (found - 1).clamp(min=1)).log2()
        costs = torch.where(found > 1, costs, float("inf"))
        taker, giver = gains.argmax(), costs.argmin()
        if left == 0 and gains[taker] <= costs[giver] * (1 + 1e-12):
            break
        if left >= 0:
            found[taker] += 1
        if left <= 0:
            found[giver] -= 1
        left -= (left > 0) - (left < 0)
    return found


def counted(symbols: Tensor, classes: Classes) -> Tensor:
    """How often each symbol occurs in each table: int64 `(tables, 256)`."""
    from hfcompress.kernels.rans import count_symbols

    counts = torch.zeros(classes.tables, SYMBOLS, dtype=torch.int64)
    count_symbols(symbols.numpy(), classes.rows.numpy(), classes.columns.numpy(), counts.numpy())
    return counts


def bits_of(counts: Tensor) -> float:
    """What a stream of symbols that occur so often takes in all, its tables included; its index is left out."""
    totals = counts.sum(1, keepdim=True).clamp(min=1).double()
    shares = counts.double() / totals
    tables = 16 * (len(counts) + int(_used(counts).sum()))
    return -(counts.double() * shares.clamp(min=1e-300).log2()).sum().item() + tables


def index_bits(shape: tuple[int, int] | torch.Size) -> int:
    """What the index of a stream takes, told from the shape of its symbols."""
    return 2 * 64 * (len(_bounds(shape)) - 1)


def classes_of(symbols: Tensor, magnitudes: Tensor) -> Classes:
    """
    The classes by which symbols take the fewest bits, tables included: rows and columns by how far their magnitudes are
    spread, in steps of a part of an octave.

    The mean magnitude of an entry is taken as proportional to that of its row and to that of its column.

    Args:
        symbols (`Tensor`): uint8 `(rows, columns)`.
        magnitudes (`Tensor`): float32 `(SYMBOLS,)`: what each symbol stands for.
    """
    best = Classes.single(symbols.shape)
    least = bits_of(counted(symbols, best))
    spread = magnitudes[symbols.int()]
    for steps in PER_OCTAVE:
        found = Classes(*(_classes(spread.mean(dim), steps) for dim in (1, 0)))
        bits = bits_of(counted(symbols, found))
        if bits < least:
            best, least = found, bits
    return best


def encode(symbols: Tensor, classes: Classes | None = None, beside: bytes = b"") -> Stream:
    """
    Args:
        symbols (`Tensor`): uint8 `(rows, columns)`.
        classes (`Classes`, *optional*): which table each has; one for all if not given.
        beside (`bytes`, *optional*): what makes sense with this stream alone, so that its alteration is an error too.

    Raises:
        InvalidValueError: there are none.
    """
    from hfcompress.kernels.rans import STATES, encode_chunks

    symbols = symbols.cpu().contiguous()
    if not symbols.numel():
        raise InvalidValueError("There are no symbols to encode.")
    classes = classes or Classes.single(symbols.shape)
    counts = counted(symbols, classes)
    frequencies = torch.stack([frequencies_of(own) if own.any() else own for own in counts])
    padded = frequencies.numpy().astype(np.uint32)
    bounds = _bounds(symbols.shape)
    words = np.empty((len(bounds) - 1, STATES + (bounds[1] - bounds[0]) * symbols.shape[1]), np.uint16)
    lengths = np.empty(len(words), np.int64)
    starts = (padded.cumsum(1) - padded).astype(np.uint32)
    told = (classes.rows.numpy(), classes.columns.numpy())
    encode_chunks(symbols.numpy(), bounds, *told, padded, starts, words, lengths)
    chunks = [row[len(row) - length :] for row, length in zip(words, lengths, strict=True)]
    used = _used(frequencies).tolist()
    stored = torch.cat([torch.cat([torch.tensor([n]), own[:n]]) for n, own in zip(used, frequencies, strict=True)])
    stored = stored.to(torch.uint16)
    seal = _seal(stored, classes, beside)
    index = torch.tensor([lengths.tolist(), [zlib.crc32(chunk.tobytes(), seal) for chunk in chunks]])
    return Stream(torch.from_numpy(np.concatenate(chunks)), index, stored, classes)


def decode(stream: Stream, beside: bytes = b"", first: int = 0, last: int | None = None) -> Tensor:
    """
    The symbols of some chunks, all of them without more said.

    Args:
        stream (`Stream`): from [`encode`].
        beside (`bytes`, *optional*): what it was encoded with.
        first (`int`, *optional*, defaults to 0): the first chunk.
        last (`int`, *optional*): the chunk behind the last.

    Returns:
        `Tensor`: uint8 `(rows of these chunks, columns)`.

    Raises:
        CheckpointError: the stream has been cut short or altered.
    """
    from hfcompress.kernels.rans import decode_chunks, fill_tables

    words, classes = stream.words.numpy(), stream.classes
    damaged = CheckpointError("An entropy-coded tensor is damaged; download or copy its file again.")
    if not all(stream.shape):
        raise damaged
    bounds = _bounds(stream.shape)
    table = np.zeros((classes.tables, TOTAL), np.uint32)
    if stream.index.shape != (2, len(bounds) - 1) or not fill_tables(stream.frequencies.long().numpy(), table):
        raise damaged
    lengths, sums = stream.index
    if lengths.min() < 0 or lengths.sum() != len(words):
        raise damaged
    chosen = slice(first, len(lengths) if last is None else last)
    offsets = np.concatenate([[0], lengths.numpy().cumsum()])[chosen.start : chosen.stop + 1]
    bounds = bounds[chosen.start : chosen.stop + 1]
    seal = _seal(stream.frequencies, classes, beside)
    for begin, end, told in zip(offsets, offsets[1:], sums[chosen].tolist(), strict=False):
        if zlib.crc32(words[begin:end].tobytes(), seal) != told:
            raise damaged
    rows = classes.rows[bounds[0] : bounds[-1]].numpy().astype(np.int64) * TOTAL
    columns = classes.columns.numpy().astype(np.int64) * TOTAL
    symbols = np.empty((len(rows), len(columns)), np.uint8)
    whole = np.empty(len(bounds) - 1, np.bool_)
    decode_chunks(words, offsets, table.reshape(-1), rows, columns, symbols, bounds - bounds[0], whole)
    if not whole.all():
        raise damaged
    return torch.from_numpy(symbols)


def _classes(spreads: Tensor, per_octave: int) -> Tensor:
    """Numbers from 0 on for the octaves of spreads or parts of them, the narrowest of too many together."""
    steps = (per_octave * (spreads / spreads.max().clamp(min=1e-30)).clamp(min=NARROWEST).log2()).round().int()
    steps = steps.clamp(min=1 - TABLES // 2)
    return (steps - steps.min()).to(torch.uint8)


def _used(counts: Tensor) -> Tensor:
    """For every table how many symbols there are up to the largest that occurs: int64 `(tables,)`."""
    return ((counts > 0) * torch.arange(1, SYMBOLS + 1)).amax(1)


def _bounds(shape: tuple[int, int] | torch.Size) -> np.ndarray:
    rows, columns = shape
    return np.append(np.arange(0, rows, max(1, CHUNK // columns)), rows)


def _seal(frequencies: Tensor, classes: Classes, beside: bytes) -> int:
    """The checksum of all that belongs to the words."""
    seal = zlib.crc32(frequencies.numpy().tobytes(), zlib.crc32(beside))
    return zlib.crc32(classes.columns.numpy().tobytes(), zlib.crc32(classes.rows.numpy().tobytes(), seal))
