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
"""Compressed linears on disk, which read as the dense weights that they stand for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.formats.layout import Layout
from hfcompress.solvers.grid import Grid, QuantizedWeight


@dataclass(frozen=True)
class PackedTensor:
    """
    A compressed linear that reads as the dense weight it stands for.

    Args:
        parts (`dict`): local name -> stored tensor.
        grid (`Grid`): its grid.
        layout (`Layout`): the format.
        shape (`tuple[int, int]`): of the dense weight.
    """

    parts: dict[str, Any]
    grid: Grid
    layout: Layout
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return next(part.dtype for name, part in self.parts.items() if name in ("scales", "weight_scale"))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts.values())

    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors, read now."""
        return {name: part.read() for name, part in self.parts.items()}

    def quantized(self) -> QuantizedWeight:
        """
        The codes and scales.

        Raises:
            CheckpointError: a part is missing.
        """
        try:
            return self.layout.unpack(self.tensors(), self.grid)
        except KeyError as error:
            beside = next(part.name for part in self.parts.values())
            raise CheckpointError(
                f"{error} is missing beside {beside}; download or copy the checkpoint again."
            ) from error

    def read(self) -> Tensor:
        """The dense weight in float32, free of the rounding to the model's dtype."""
        return self.quantized().dequantize()

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


def packed_stems(tensors: Mapping[str, Any], local: str) -> list[str]:
    """The names of the linears that have a tensor called `local`."""
    return [name.removesuffix(f".{local}") for name in tensors if name.endswith(f".{local}")]
