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
A weight of vectors, or of sums of them.

`weight_vectors` float16 `(tables, 2^bits, length)` holds the vectors of each table, the shortest first, and `weight_scale`
float16 `(out_features, 1)` what those of a row are multiplied by. Where rows have books of their own it is `(books, tables,
2^bits, length)`, row `r` having book `r // ceil(out_features / books)`. Their numbers, `(out_features, in_features / length *
tables)` with those of one place beside each other, are stored as in [`hfcompress.formats.native.numbers`].
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.formats.native import numbers
from hfcompress.formats.native.codebook import Codebook
from hfcompress.formats.stored import PackedTensor
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight, books_of, codes_dtype, shortest_first


VECTORS, SCALE = "weight_vectors", "weight_scale"
LOCALS = (*numbers.LOCALS, VECTORS, SCALE)


class VectorCodes(Codebook):
    """Numbers of vectors, the vectors, and a scale per row."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        assert weight.vectors is not None
        vectors, codes = shortest_first(weight.vectors.cpu(), weight.codes.cpu())
        vectors = vectors[0] if len(vectors) == 1 else vectors
        stored = numbers.packed(codes.flatten(1), _bits(vectors), vectors)
        return {**stored, VECTORS: vectors, SCALE: weight.scales}

    def expected(self, shape: LinearShape, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
        """
        The tensors of a linear whose codes take no fewer bytes if they are entropy-coded, or of one whose rate is the one that
        is asked for, without values.
        """
        count = shape.in_features // grid.group_size * grid.tables
        codes = torch.empty(shape.out_features, count, dtype=codes_dtype(grid.entries), device="meta")
        scales, books = torch.empty(shape.out_features, 1, dtype=dtype, device="meta"), grid.books(shape.out_features)
        several = () if books == 1 else (books,)
        vectors = scales.new_empty(*several, grid.tables, grid.entries, grid.group_size)
        if grid.limit is not None:
            left = grid.limit * shape.out_features * shape.in_features / 8 - vectors.nbytes - scales.nbytes
            words = torch.empty(max(round(left / 2), 1), dtype=torch.uint16, device="meta")
            return {numbers.WORDS: words, VECTORS: vectors, SCALE: scales}
        return {**numbers.in_words(codes, _bits(vectors)), VECTORS: vectors, SCALE: scales}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """
        Raises:
            CheckpointError: the tensors do not belong together.
        """
        vectors, scales = tensors[VECTORS], tensors[SCALE]
        each = (grid.tables, grid.entries, grid.group_size)
        if scales.dim() != 2 or scales.shape[1] != 1 or vectors.shape[-3:] != each or vectors.dim() > 4:
            raise _damaged()
        codes = numbers.unpacked(tensors, _bits(vectors), len(scales), vectors)
        books = vectors.view(-1, *each)
        if codes.shape[1] % grid.tables or int(books_of(len(scales), len(books)).max()) != len(books) - 1:
            raise _damaged()
        return QuantizedWeight(codes.unflatten(1, (-1, grid.tables)), scales, None, grid, vectors=books)

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        found = {local: tensors[f"{stem}.{local}"] for local in LOCALS if f"{stem}.{local}" in tensors}
        return self.unpack(found, grid).dequantize()


class VectorTensor(PackedTensor):
    """A weight of vectors that reads as the dense weight it stands for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self.parts[VECTORS].dtype


def _bits(vectors: Tensor) -> int:
    return vectors.shape[-2].bit_length() - 1


def _damaged() -> CheckpointError:
    return CheckpointError("A weight of vectors is damaged; download or copy its file again.")


def grid_of(vectors: torch.Size | tuple[int, ...]) -> Grid:
    """
    The grid of a weight whose vectors have this shape.

    Raises:
        CheckpointError: none has.
    """
    tables, entries, length = vectors[-3:] if len(vectors) in (3, 4) else (0, 0, 0)
    bits = entries.bit_length() - 1
    if not all(vectors) or not length or not 1 <= bits <= numbers.WIDEST or entries != 2**bits:
        raise _damaged()
    return Grid(0, length, type="vector", rate=bits * tables / length, tables=tables)
