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
A weight whose rows have levels of their own.

`weight` int32 `(out_features, words)` holds the numbers of the levels from 0 up, in 1, 2, 3 or 4 bits each, one after the
other from the lowest bit of a row's first word on; the last word of a row is filled up with zeros. `weight_codebook` float16
`(out_features, 2^bits)` holds the levels, and `weight_shape` int64 `(2,)` the shape of the weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.formats.layout import Layout, refuse_cache, refuse_conv1d
from hfcompress.formats.packing import WORD, pack, unpack
from hfcompress.formats.stored import PackedTensor
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


CODES, LEVELS, SHAPE = "weight", "weight_codebook", "weight_shape"
LOCALS = (CODES, LEVELS, SHAPE)


class Codebook(Layout):
    """Numbers of levels, packed, and the levels."""

    name = "hfcompress"
    quant_method = "hfcompress"
    packages = ()

    def check(self, shape: LinearShape, grid: Grid) -> None:
        refuse_conv1d(self.name, shape)

    def check_coded(self, name: str, grid: Grid) -> None:
        """It is made for them."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        half = 2 ** (weight.grid.bits - 1)
        codes = (weight.codes.short() - half).to(torch.int8)
        return {
            CODES: pack(codes, weight.grid.bits),
            LEVELS: weight.scales,
            SHAPE: torch.tensor(weight.codes.shape),
        }

    def expected(self, shape: LinearShape, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
        codes = torch.empty(shape.out_features, shape.in_features, dtype=torch.uint8, device="meta")
        levels = torch.empty(shape.out_features, 2**grid.bits, dtype=dtype, device="meta")
        return self.pack(QuantizedWeight(codes, levels, None, grid))

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """
        Raises:
            CheckpointError: the tensors do not belong together.
        """
        levels, shape = tensors[LEVELS], tensors[SHAPE].flatten().tolist()
        words = -(-shape[-1] * grid.bits // WORD) if shape else 0
        whole = len(shape) == 2 and tensors[CODES].dtype == torch.int32 and tensors[CODES].shape == (shape[0], words)
        if not whole or levels.shape != (shape[0], 2**grid.bits):
            raise CheckpointError("A weight on codebooks is damaged; download or copy its file again.")
        codes = unpack(tensors[CODES], grid.bits, shape[1]).short() + 2 ** (grid.bits - 1)
        return QuantizedWeight(codes.to(torch.uint8), levels, None, grid)

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        return self.unpack({local: tensors[f"{stem}.{local}"] for local in LOCALS}, grid).dequantize()

    def scale_dtype(self, stored: torch.dtype) -> torch.dtype:
        """float16, whose steps between levels are finer than bfloat16's."""
        return torch.float16

    def quantization_config(self, grids, untouched, kv_cache=None):
        """That of the format as a whole."""
        refuse_cache(self.name, kv_cache)
        return {"quant_method": self.quant_method}


class CodebookTensor(PackedTensor):
    """A weight on codebooks that reads as the dense weight it stands for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the levels."""
        return self.parts[LEVELS].dtype


def grid_of(levels: torch.Size | tuple[int, ...]) -> Grid:
    """
    The grid of a weight whose levels have this shape.

    Raises:
        CheckpointError: none has.
    """
    size = levels[-1] if levels else 0
    bits = size.bit_length() - 1
    if size not in (2, 4, 8, 16):
        raise CheckpointError("A weight on codebooks is damaged; download or copy its file again.")
    return Grid(bits, type="codebook")
