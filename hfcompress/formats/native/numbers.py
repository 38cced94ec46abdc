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
Numbers from 0 up, each below `2^bits`, that say what of a table stands at a place: uint8 `(rows, columns)`, or int32 if they
take more than 8 bits, stored in one of two ways, whichever takes fewer bytes.

- `weight` int32 `(rows, words)` holds them in 1 to 16 bits each, one after the other from the lowest bit of a row's first
  word on; the last word of a row is filled up with zeros. `weight_shape` int64 `(2,)` is their shape.
- Entropy-coded, if they take at most 8 bits, as a stream ([`hfcompress.formats.native`]); `weight_classes` uint8 `(rows + columns,)` has the classes of
  the rows and behind them those of the columns. The checksums begin with the table.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.formats.native.streams import FREQUENCIES, STREAM, WORDS, stored, symbols_of
from hfcompress.formats.packing import WORD, pack, unpack
from hfcompress.solvers.entropy import SYMBOLS, Classes, classes_of, encode


SHAPE, CLASSES = "weight_shape", "weight_classes"
LOCALS = (*STREAM, SHAPE, CLASSES)
WIDEST = 16  # bits
MAGNITUDES = torch.arange(SYMBOLS).float()  # what lies the farther from zero has the higher number


def in_words(numbers: Tensor, bits: int) -> dict[str, Tensor]:
    """The tensors of numbers that are not entropy-coded."""
    signed = numbers.int() - 2 ** (bits - 1)
    return {WORDS: pack(signed if bits > 8 else signed.to(torch.int8), bits), SHAPE: torch.tensor(numbers.shape)}


def packed(numbers: Tensor, bits: int, table: Tensor) -> dict[str, Tensor]:
    """
    Args:
        numbers (`Tensor`): uint8 or int32 `(rows, columns)`.
        bits (`int`): of each, 1 to 16.
        table (`Tensor`): what they are numbers of.
    """
    if bits > 8:
        return in_words(numbers, bits)
    classes = classes_of(numbers, MAGNITUDES)
    coded = stored(encode(numbers, classes, _bytes(table))) | {CLASSES: torch.cat([classes.rows, classes.columns])}
    return min(coded, in_words(numbers, bits), key=lambda tensors: sum(tensor.nbytes for tensor in tensors.values()))


def unpacked(tensors: Mapping[str, Tensor], bits: int, rows: int, table: Tensor) -> Tensor:
    """
    The numbers of either way.

    Args:
        tensors (`Mapping[str, Tensor]`): by local names.
        bits (`int`): of each.
        rows (`int`): how many they are.
        table (`Tensor`): what they are numbers of.

    Raises:
        CheckpointError: the tensors do not belong together.
    """
    damaged = CheckpointError("The numbers of a codebook are damaged; download or copy their file again.")
    if FREQUENCIES in tensors:
        classes = tensors[CLASSES]
        if classes.dim() != 1 or classes.dtype != torch.uint8 or len(classes) <= rows:
            raise damaged
        found = symbols_of(tensors, Classes(classes[:rows].contiguous(), classes[rows:].contiguous()), _bytes(table))
        if int(found.max()) >= 2**bits:
            raise damaged
        return found
    shape = tensors[SHAPE].flatten().tolist()
    words = -(-shape[-1] * bits // WORD) if shape else 0
    whole = len(shape) == 2 and shape[0] == rows and tensors[WORDS].dtype == torch.int32
    if not whole or tensors[WORDS].shape != (rows, words):
        raise damaged
    found = unpack(tensors[WORDS], bits, shape[1]).int() + 2 ** (bits - 1)
    return found if bits > 8 else found.to(torch.uint8)


def columns_of(parts: Mapping[str, Any], rows: int) -> int:
    """How many numbers a row has, of stored tensors by local names."""
    if CLASSES in parts:
        [both] = parts[CLASSES].shape
        return both - rows
    _, columns = parts[SHAPE].read().tolist()
    return columns


def _bytes(table: Tensor) -> bytes:
    return table.cpu().contiguous().view(torch.uint8).numpy().tobytes()
