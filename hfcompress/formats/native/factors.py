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
A weight of two factors, whose product it is, or that and the weight of another block.

`weight` `(out_features, rank)` and `weight_right` `(rank, in_features)`, both in the dtype that the weight had. With
`weight_base` int64 `(1,)` there is added the matrix whose name is the same but for the number of the block, which is the
first number in it: `weight_base`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.formats.native.codebook import Codebook
from hfcompress.formats.stored import PackedTensor
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


LEFT, RIGHT, BASE = "weight", "weight_right", "weight_base"
FACTORS = (LEFT, RIGHT)
LOCALS = (*FACTORS, BASE)


class Factors(Codebook):
    """Both factors, as they are."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        base = {} if weight.grid.base is None else {BASE: torch.tensor([weight.grid.base])}
        return {LEFT: weight.codes.contiguous(), RIGHT: weight.scales.contiguous(), **base}

    def expected(self, shape: LinearShape, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
        left = torch.empty(shape.out_features, grid.rank, dtype=dtype, device="meta")
        return self.pack(QuantizedWeight(left, left.new_empty(grid.rank, shape.in_features), None, grid))

    def scale_dtype(self, stored: torch.dtype) -> torch.dtype:
        """That of the weight."""
        return stored

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """
        The factors; what they are added to is elsewhere.

        Raises:
            CheckpointError: the tensors do not belong together.
        """
        left, right = (tensors[local] for local in FACTORS)
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != len(right) or left.dtype != right.dtype:
            raise CheckpointError("A weight of two factors is damaged; download or copy its file again.")
        return QuantizedWeight(left, right, None, grid)

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        return self.unpack({local: tensors[f"{stem}.{local}"] for local in FACTORS}, grid).dequantize()


@dataclass(frozen=True)
class FactoredTensor(PackedTensor):
    """
    A weight of two factors that reads as their product.

    Args:
        base (*optional*): the stored weight that it is added to.
    """

    base: Any = None

    def quantized(self) -> QuantizedWeight:
        """The factors, and what they are added to."""
        found = super().quantized()
        return found if self.base is None else replace(found, base=self.base.read().float())

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.parts[LEFT].dtype
