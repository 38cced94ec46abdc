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
"""Codes of a few bits, packed densely into 32-bit words, least significant bits first; a code may cross two words."""

import torch
from torch import Tensor


WORD = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """
    Pack signed codes along the last dimension, each stored as `code + 2**(bits - 1)`.

    Args:
        codes (`Tensor`): int8, or int32 of more than 8 bits, `(rows, columns)`, in `[-2**(bits-1), 2**(bits-1) - 1]`.
        bits (`int`): bits per code, 1 to 16.

    Returns:
        `Tensor`: int32 `(rows, ceil(columns * bits / 32))`.
    """
    if WORD % bits == 0:
        return _packed_within_words(codes, bits)
    rows, columns = codes.shape
    words = -(-columns * bits // WORD)
    runs = -(-columns // WORD)  # 32 codes fill exactly `bits` words
    unsigned = torch.zeros(rows, runs * WORD, dtype=torch.int64, device=codes.device)
    unsigned[:, :columns] = codes.long() + 2 ** (bits - 1)
    unsigned = unsigned.view(rows, runs, WORD)
    packed = torch.zeros(rows, runs, bits + 1, dtype=torch.int64, device=codes.device)
    for position in range(WORD):
        word, shift = divmod(position * bits, WORD)
        shifted = unsigned[..., position] << shift
        packed[..., word] |= shifted & 0xFFFFFFFF
        packed[..., word + 1] |= shifted >> WORD
    packed = packed[..., :bits].reshape(rows, -1)[:, :words]
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _packed_within_words(codes: Tensor, bits: int) -> Tensor:
    """[`pack`] where no code lies in two words."""
    rows, columns = codes.shape
    each = WORD // bits
    codes = torch.nn.functional.pad(codes, (0, -columns % each), value=-(2 ** (bits - 1)))  # which is stored as zero
    codes = codes.reshape(rows, -1, each)
    packed = torch.zeros(codes.shape[:2], dtype=torch.int32, device=codes.device)
    for position in range(each):
        packed |= (codes[..., position].int() + 2 ** (bits - 1)) << (position * bits)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """
    The inverse of [`pack`].

    Args:
        packed (`Tensor`): int32 `(rows, ceil(columns * bits / 32))`.
        bits (`int`): bits per code.
        columns (`int`): codes per row.

    Returns:
        `Tensor`: int8, or int32 of more than 8 bits, `(rows, columns)`.
    """
    position = torch.arange(columns, device=packed.device) * bits
    word, shift = position // WORD, position % WORD
    padded = torch.nn.functional.pad(packed.long() & 0xFFFFFFFF, (0, 1))
    both = padded[:, word] | (padded[:, word + 1] << WORD)
    codes = ((both >> shift) & (2**bits - 1)) - 2 ** (bits - 1)
    return codes.to(torch.int8 if bits <= 8 else torch.int32)
