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
A weight whose rows, or groups of neighbours in a row, have levels of their own.

`weight_codebook` float16 `(out_features, 2^bits)` holds the levels, those nearest to zero first; with groups it is
`(out_features, groups, 2^bits)`, all groups of a row being as wide. Their numbers are stored as in
[`hfcompress.formats.native.numbers`].
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.formats.layout import Layout, refuse_cache, refuse_conv1d
from hfcompress.formats.native import numbers
from hfcompress.formats.stored import PackedTensor
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


LEVELS = "weight_codebook"
LOCALS = (*numbers.LOCALS, LEVELS)


class Codebook(Layout):
    """Numbers of levels, and the levels."""

    name = "hfcompress"
    quant_method = "hfcompress"
    packages = ()

    def check(self, shape: LinearShape, grid: Grid) -> None:
        refuse_conv1d(self.name, shape)

    def check_coded(self, name: str, grid: Grid) -> None:
        """It is made for them."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        order = weight.scales.float().abs().sort(dim=-1, stable=True).indices.cpu()
        levels = weight.scales.cpu().gather(-1, order)
        ranks = order.argsort(-1).to(torch.uint8).flatten(0, -2)
        codes = ranks.gather(1, weight.codes.cpu().long().view(len(ranks), -1)).view(weight.codes.shape)
        return {**numbers.packed(codes, weight.grid.bits, levels), LEVELS: levels}

    def expected(self, shape: LinearShape, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a linear whose codes take no fewer bytes if they are entropy-coded, without values."""
        codes = torch.empty(shape.out_features, shape.in_features, dtype=torch.uint8, device="meta")
        groups = () if grid.group_size == -1 else (shape.in_features // grid.group_size,)
        levels = torch.empty(shape.out_features, *groups, 2**grid.bits, dtype=dtype, device="meta")
        return {**numbers.in_words(codes, grid.bits), LEVELS: levels}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """
        Raises:
            CheckpointError: the tensors do not belong together.
        """
        levels = tensors[LEVELS]
        if levels.dim() not in (2, 3) or levels.shape[-1] != 2**grid.bits:
            raise CheckpointError("A weight on codebooks is damaged; download or copy its file again.")
        codes = numbers.unpacked(tensors, grid.bits, len(levels), levels)
        if codes.shape[1] % (levels.shape[1] if levels.dim() == 3 else 1):
            raise CheckpointError("A weight on codebooks is damaged; download or copy its file again.")
        return QuantizedWeight(codes, levels, None, grid)

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        found = {local: tensors[f"{stem}.{local}"] for local in LOCALS if f"{stem}.{local}" in tensors}
        return self.unpack(found, grid).dequantize()

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
    The grid of a weight whose levels have this shape, which does not say how wide groups are.

    Raises:
        CheckpointError: none has.
    """
    size = levels[-1] if levels else 0
    bits = size.bit_length() - 1
    if size not in (2, 4, 8, 16):
        raise CheckpointError("A weight on codebooks is damaged; download or copy its file again.")
    return Grid(bits, type="codebook")
