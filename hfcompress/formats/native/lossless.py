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
A tensor as it was, in fewer bytes: the exponents of trained weights take under three bits of their eight.

A value's bits are rotated left by one, which puts its exponent in front; the highest byte is a symbol of the stream
([`hfcompress.formats.native`]), in one table (all classes are 0, and stored nowhere), and the others follow as they are,
lowest first, in `weight_bfloat16`, `weight_float16` or `weight_float32`, uint8 `(rows, columns * others)`, whose name is the
values' dtype. (Of bfloat16 the first byte is the exponent: DFloat11, arXiv 2504.11651; ZipNN, arXiv 2411.05239.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.formats.dense import Dense
from hfcompress.formats.layout import refuse_conv1d
from hfcompress.formats.native.streams import FREQUENCIES, INDEX, STREAM, WORDS, stored, symbols_of
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.entropy import CHUNK, Classes, encode
from hfcompress.solvers.grid import Grid, QuantizedWeight


WHOLE = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
REST = {f"weight_{str(dtype).removeprefix('torch.')}": dtype for dtype in WHOLE}
LOCALS = (*STREAM, *REST)
LEAST = 1 << 14  # values that are worth a table
EXPECTED = 2.7  # bits of an exponent byte, before it is looked at


class Lossless(Dense):
    """Plain weights, their exponents entropy-coded."""

    name = "hfcompress"
    quant_method = "hfcompress"

    def check(self, shape: LinearShape, grid: Grid) -> None:
        refuse_conv1d(self.name, shape)

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return packed(weight.codes.cpu())

    def expected(self, shape: LinearShape, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of such a weight, without values, if its exponents are spread as usual."""
        rows, columns = shape.out_features, shape.in_features
        if dtype not in WHOLE or rows * columns < LEAST:
            return {WORDS: torch.empty(rows, columns, dtype=dtype, device="meta")}
        [rest] = [local for local, stored in REST.items() if stored == dtype]
        sizes = {
            WORDS: ((round(EXPECTED * rows * columns / 16),), torch.uint16),
            INDEX: ((2, -(-rows // max(1, CHUNK // columns))), torch.int64),
            FREQUENCIES: ((128,), torch.uint16),
            rest: ((rows, columns * (dtype.itemsize - 1)), torch.uint8),
        }
        return {local: torch.empty(*size, dtype=kind, device="meta") for local, (size, kind) in sizes.items()}

    def values(self, weight: QuantizedWeight) -> Tensor:
        return weight.codes.float()

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        found = {local: tensors[f"{stem}.{local}"] for local in LOCALS if f"{stem}.{local}" in tensors}
        return (unpacked(found) if FREQUENCIES in found else found[WORDS]).float()


def packed(weight: Tensor) -> dict[str, Tensor]:
    """
    A matrix by local names: coded, or as it is where that takes fewer bytes.

    Args:
        weight (`Tensor`): `(rows, columns)` of any dtype.
    """
    if weight.dtype not in WHOLE or weight.dim() != 2 or weight.numel() < LEAST:
        return {WORDS: weight}
    whole = weight.contiguous().view(WHOLE[weight.dtype])
    sign = whole < 0
    turned = (whole << 1 | sign.to(whole.dtype)).contiguous()
    each = turned.view(torch.uint8).view(*weight.shape, weight.dtype.itemsize)
    [rest] = [local for local, dtype in REST.items() if dtype == weight.dtype]
    found = {**stored(encode(each[..., -1].contiguous())), rest: each[..., :-1].flatten(1).contiguous()}
    return found if sum(tensor.nbytes for tensor in found.values()) < weight.nbytes else {WORDS: weight}


def unpacked(tensors: Mapping[str, Tensor]) -> Tensor:
    """
    The inverse of [`packed`] where that has coded the matrix.

    Raises:
        CheckpointError: it has been altered or cut short.
    """
    found = [local for local in REST if local in tensors]
    rest = tensors[found[0]] if len(found) == 1 else torch.empty(0)
    dtype = REST[found[0]] if len(found) == 1 else torch.bfloat16
    others = dtype.itemsize - 1
    if rest.dtype != torch.uint8 or rest.dim() != 2 or rest.shape[1] % others:
        raise CheckpointError("An entropy-coded tensor is damaged; download or copy its file again.")
    rows, columns = len(rest), rest.shape[1] // others
    highest = symbols_of(tensors, Classes.single((rows, columns)))
    each = torch.cat([rest.view(rows, columns, others), highest.unsqueeze(-1)], -1)
    turned = each.view(WHOLE[dtype]).squeeze(-1)
    mask = (1 << (8 * dtype.itemsize - 1)) - 1
    return ((turned >> 1 & mask) | (turned << (8 * dtype.itemsize - 1))).view(dtype)


@dataclass(frozen=True)
class LosslessTensor:
    """
    Such a matrix, which reads as what it was.

    Args:
        parts (`dict`): local name -> stored tensor.
    """

    parts: dict[str, Any]

    @property
    def _rest(self) -> str:
        return next(local for local in self.parts if local in REST)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return REST[self._rest]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        rows, columns = self.parts[self._rest].shape
        return rows, columns // (self.dtype.itemsize - 1)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts.values())

    def read(self) -> Tensor:
        """The matrix."""
        return unpacked({local: part.read() for local, part in self.parts.items()})

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]
