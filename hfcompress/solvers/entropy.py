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
Symbols in as many bits as they are worth: rANS with one table of frequencies, in chunks that decode by themselves.

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
CHUNK = 1 << 16  # symbols that are decoded together
TOTAL = 1 << 12  # the sum of the frequencies


@dataclass(frozen=True)
class Stream:
    """
    Encoded symbols.

    Args:
        words (`Tensor`): uint16 `(words,)`.
        index (`Tensor`): int64 `(2, chunks)`: how many words each chunk has, and the CRC-32 of its words behind that of the
            table.
        frequencies (`Tensor`): uint16 `(symbols,)`: of the symbols 0, 1, ..., with the sum 4096.
        count (`int`): symbols.
    """

    words: Tensor
    index: Tensor
    frequencies: Tensor
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.words.nbytes + self.index.nbytes + self.frequencies.nbytes


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


def encode(symbols: Tensor) -> Stream:
    """
    Args:
        symbols (`Tensor`): uint8, of any shape.

    Raises:
        InvalidValueError: there are none.
    """
    from hfcompress.kernels.rans import STATES, encode_chunks

    flat = symbols.cpu().flatten()
    if not len(flat):
        raise InvalidValueError("There are no symbols to encode.")
    counts = torch.bincount(flat, minlength=1)
    frequencies = frequencies_of(counts)
    padded = np.zeros(SYMBOLS, np.uint32)
    padded[: len(frequencies)] = frequencies.numpy()
    bounds = _bounds(len(flat))
    words = np.empty((len(bounds) - 1, STATES + min(CHUNK, len(flat))), np.uint16)
    lengths = np.empty(len(words), np.int64)
    starts = (padded.cumsum() - padded).astype(np.uint32)
    encode_chunks(flat.numpy(), bounds, padded, starts, words, lengths)
    chunks = [row[len(row) - length :] for row, length in zip(words, lengths, strict=True)]
    stored = frequencies.to(torch.uint16)
    sums = [_checksum(chunk, stored) for chunk in chunks]
    index = torch.tensor([lengths.tolist(), sums])
    return Stream(torch.from_numpy(np.concatenate(chunks)), index, stored, len(flat))


def decode(stream: Stream, first: int = 0, last: int | None = None) -> Tensor:
    """
    The symbols of some chunks, all of them without more said.

    Args:
        stream (`Stream`): from [`encode`].
        first (`int`, *optional*, defaults to 0): the first chunk.
        last (`int`, *optional*): the chunk behind the last.

    Returns:
        `Tensor`: uint8 `(symbols,)`.

    Raises:
        CheckpointError: the stream has been cut short or altered.
    """
    from hfcompress.kernels.rans import decode_chunks

    words, frequencies = stream.words.numpy(), stream.frequencies.long()
    bounds = _bounds(stream.count)
    damaged = CheckpointError("An entropy-coded tensor is damaged; download or copy its file again.")
    if stream.index.shape != (2, len(bounds) - 1) or not 0 < len(frequencies) <= SYMBOLS:
        raise damaged
    lengths, sums = stream.index
    if frequencies.sum() != TOTAL or lengths.min() < 0 or lengths.sum() != len(words):
        raise damaged
    chosen = slice(first, len(lengths) if last is None else last)
    offsets = np.concatenate([[0], lengths.numpy().cumsum()])[chosen.start : chosen.stop + 1]
    bounds = bounds[chosen.start : chosen.stop + 1]
    for begin, end, told in zip(offsets, offsets[1:], sums[chosen].tolist(), strict=False):
        if _checksum(words[begin:end], stream.frequencies) != told:
            raise damaged
    symbols = np.empty(bounds[-1] - bounds[0], np.uint8)
    whole = np.empty(len(bounds) - 1, np.bool_)
    decode_chunks(words, offsets, _table(frequencies), symbols, bounds - bounds[0], whole)
    if not whole.all():
        raise damaged
    return torch.from_numpy(symbols)


def _bounds(count: int) -> np.ndarray:
    return np.append(np.arange(0, count, CHUNK), count)


def _checksum(words: np.ndarray, frequencies: Tensor) -> int:
    return zlib.crc32(words.tobytes(), zlib.crc32(frequencies.numpy().tobytes()))


def _table(frequencies: Tensor) -> np.ndarray:
    """See [`hfcompress.kernels.rans.decode_chunks`]."""
    symbols = torch.repeat_interleave(torch.arange(len(frequencies)), frequencies)
    begins = frequencies.cumsum(0) - frequencies
    entries = symbols << 24 | (frequencies[symbols] - 1) << 12 | torch.arange(TOTAL) - begins[symbols]
    return entries.numpy().astype(np.uint32)
