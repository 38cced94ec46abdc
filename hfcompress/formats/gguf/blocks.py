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
The blocks of 32 weights that GGUF holds a quantized row in, packed from codes that are kept as they are.

| type | bytes | value of a weight |
|---|---|---|
| Q4_0 | scale, 16 bytes of two codes | `scale * (q - 8)` |
| Q4_1 | scale, offset, 16 bytes of two codes | `scale * q + offset` |
| Q8_0 | scale, 32 codes | `scale * q` |

Scales and offsets are float16, little endian; `q` is unsigned in the first two; byte `j` holds weight `j` in its lower
half and weight `j + 16` in its upper one (ggml-common.h, `block_q4_0` and the others). A symmetric grid of 2 to 4 bits
is that of Q4_0, with codes of fewer bits in the middle of it, and one of 5 to 8 bits is that of Q8_0; an asymmetric one
of up to 4 bits is that of Q4_1 wherever float16 holds the offset.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hfcompress.solvers.grid import Grid, QuantizedWeight


BLOCK = 32


def pack_q4_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """
    Args:
        codes (`np.ndarray`): int8 `(rows, columns)` in -8 to 7, the columns a multiple of 32.
        scales (`np.ndarray`): float16 `(rows, columns / 32)`.

    Returns:
        `np.ndarray`: uint8 `(rows, columns / 32 * 18)`.
    """
    return _join(scales, _nibbles(codes + 8))


def pack_q4_1(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """
    Args:
        codes (`np.ndarray`): `(rows, columns)` in 0 to 15, the columns a multiple of 32.
        scales (`np.ndarray`): float16 `(rows, columns / 32)`.
        offsets (`np.ndarray`): float16 `(rows, columns / 32)`.

    Returns:
        `np.ndarray`: uint8 `(rows, columns / 32 * 20)`.
    """
    return _join(scales, offsets, _nibbles(codes))


def pack_q8_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """
    Args:
        codes (`np.ndarray`): int8 `(rows, columns)`, the columns a multiple of 32.
        scales (`np.ndarray`): float16 `(rows, columns / 32)`.

    Returns:
        `np.ndarray`: uint8 `(rows, columns / 32 * 34)`.
    """
    rows = len(codes)
    return _join(scales, codes.astype(np.int8).view(np.uint8).reshape(rows, -1, BLOCK))


def _nibbles(codes: np.ndarray) -> np.ndarray:
    halves = codes.astype(np.uint8).reshape(len(codes), -1, 2, BLOCK // 2)
    return halves[:, :, 0] | (halves[:, :, 1] << 4)


def _join(*parts: np.ndarray) -> np.ndarray:
    """`(rows, blocks)` of float16 and `(rows, blocks, bytes)` behind each other, block by block."""
    rows, blocks = parts[0].shape
    as_bytes = [
        np.ascontiguousarray(part.astype("<f2")).view(np.uint8).reshape(rows, blocks, 2) if part.ndim == 2 else part
        for part in parts
    ]
    return np.concatenate(as_bytes, axis=-1).reshape(rows, -1)


@dataclass(frozen=True)
class Blocks:
    """
    A weight in GGUF's blocks.

    Args:
        type (`str`): `"Q4_0"`, `"Q4_1"` or `"Q8_0"`.
        data (`np.ndarray`): uint8 `(rows, bytes per row)`.
    """

    type: str
    data: np.ndarray


def block_type(grid: Grid, in_features: int) -> str | None:
    """The type whose grid holds this one, code for code; `None` if none does."""
    if grid.type != "int" or grid.columns(in_features) % BLOCK:
        return None
    if grid.symmetric:
        return "Q4_0" if grid.bits <= 4 else "Q8_0"
    return "Q4_1" if grid.bits <= 4 else None


def half(values: Tensor) -> tuple[np.ndarray, bool, bool]:
    """
    Values in float16.

    Args:
        values (`Tensor`): floating point.

    Returns:
        `tuple[np.ndarray, bool, bool]`: float16 of the same shape; whether all are finite; whether none has changed.
    """
    wide = values.to(torch.float32)
    narrow = wide.to(torch.float16)
    return narrow.numpy(), bool(torch.isfinite(narrow).all()), torch.equal(narrow.float(), wide)


def scales_and_offsets(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """
    What Q4_1 calls scale and offset: `(code - zero) * scale` is `q * scale + offset` with `q` counted from zero.

    Returns:
        `tuple[Tensor, Tensor or None]`: float32 `(rows, groups)` each; no offset for a symmetric grid.
    """
    scales = weight.scales.float()
    if weight.zero_points is None:
        return scales, None
    return scales, -scales * (weight.zero_points.float() - weight.grid.q_min)


def is_exact(weight: QuantizedWeight) -> tuple[bool, bool]:
    """
    Whether float16 holds the scales and offsets of a weight: `(at all, unchanged)`. Ours have 8 significant bits
    (bfloat16) or 11, so the scales nearly always fit; an offset is a product with up to 4 more.
    """
    found = [half(part) for part in scales_and_offsets(weight) if part is not None]
    return all(finite for _, finite, _ in found), all(same for _, _, same in found)


def pack(weight: QuantizedWeight) -> Blocks:
    """
    The blocks of a weight that one of the types holds; scales and offsets are rounded to float16.

    Args:
        weight (`QuantizedWeight`): of a grid for which [`block_type`] names a type.
    """
    kind = block_type(weight.grid, weight.codes.shape[1])
    assert kind is not None
    codes = weight.codes.numpy()
    per_group = codes.shape[1] // weight.scales.shape[1] // BLOCK
    scales, offsets = scales_and_offsets(weight)
    scales = np.repeat(half(scales)[0], per_group, axis=1)
    if offsets is not None:
        unsigned = codes.astype(np.int16) - weight.grid.q_min
        return Blocks(kind, pack_q4_1(unsigned, scales, np.repeat(half(offsets)[0], per_group, axis=1)))
    return Blocks(kind, (pack_q4_0 if kind == "Q4_0" else pack_q8_0)(codes, scales))
