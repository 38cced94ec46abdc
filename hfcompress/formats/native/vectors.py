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
A weight of vectors.

`weight` uint8 `(out_features, in_features / length)` holds the numbers of vectors, `weight_vectors` float16 `(256, length)`
these, and `weight_scale` float16 `(out_features, 1)` what the vectors of a row are multiplied by.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.formats.native.codebook import Codebook
from hfcompress.formats.stored import PackedTensor
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


CODES, VECTORS, SCALE = "weight", "weight_vectors", "weight_scale"
LOCALS = (CODES, VECTORS, SCALE)
ENTRIES = 256


class VectorCodes(Codebook):
    """Numbers of vectors, the vectors, and a scale per row."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        assert weight.vectors is not None
        return {CODES: weight.codes.contiguous(), VECTORS: weight.vectors, SCALE: weight.scales}

    def expected(self, shape: LinearShape, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
        numbers = shape.in_features // grid.group_size
        codes = torch.empty(shape.out_features, numbers, dtype=torch.uint8, device="meta")
        scales = torch.empty(shape.out_features, 1, dtype=dtype, device="meta")
        vectors = torch.empty(ENTRIES, grid.group_size, dtype=dtype, device="meta")
        return self.pack(QuantizedWeight(codes, scales, None, grid, vectors=vectors))

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """
        Raises:
            CheckpointError: the tensors do not belong together.
        """
        codes, vectors, scales = (tensors[local] for local in LOCALS)
        whole = codes.dtype == torch.uint8 and codes.dim() == 2 and scales.shape == (len(codes), 1)
        if not whole or vectors.shape != (ENTRIES, grid.group_size):
            raise CheckpointError("A weight of vectors is damaged; download or copy its file again.")
        return QuantizedWeight(codes, scales, None, grid, vectors=vectors)

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        return self.unpack({local: tensors[f"{stem}.{local}"] for local in LOCALS}, grid).dequantize()


class VectorTensor(PackedTensor):
    """A weight of vectors that reads as the dense weight it stands for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self.parts[VECTORS].dtype


def grid_of(vectors: torch.Size | tuple[int, ...]) -> Grid:
    """
    The grid of a weight whose vectors have this shape.

    Raises:
        CheckpointError: none has.
    """
    if len(vectors) != 2 or vectors[1] not in (2, 4, 8):
        raise CheckpointError("A weight of vectors is damaged; download or copy its file again.")
    return Grid(8 // vectors[1], vectors[1], type="vector")
