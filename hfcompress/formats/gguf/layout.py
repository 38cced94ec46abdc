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
"""A pack-quantized checkpoint, and beside its weights the same values as one GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import InvalidValueError
from hfcompress.formats.compressed_tensors import PackQuantized
from hfcompress.formats.gguf.blocks import BLOCK
from hfcompress.formats.layout import refuse_cache
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


# the largest value of both bfloat16 and float16
LARGEST = 65280.0


class GGUF(PackQuantized):
    """
    The folder is an ordinary pack-quantized one; `model-q4_0.gguf` (or `model-q8_0.gguf`) in it is for llama.cpp.

    Scales are such as both hold: in float16's range, and where float16 is coarser than bfloat16 (below `2**-17`, a
    group whose weights are all below `2**-14`) multiples of its least step.
    """

    name = "gguf"

    def check(self, shape: LinearShape, grid: Grid) -> None:
        super().check(shape, grid)
        if not grid.symmetric:
            raise InvalidValueError(
                f"GGUF rounds the offsets of an asymmetric grid, so the file and the folder would differ in {shape.name}; set "
                "symmetric=true."
            )
        if grid.group_size == -1 or grid.group_size % BLOCK:
            raise InvalidValueError(
                f"GGUF has a scale for each {BLOCK} weights of a row, and {shape.name} is to have one per row; set group_size to "
                "32, 64 or 128, or leave the linear alone with ignore."
            )

    def check_model(self, checkpoint: Any) -> None:
        """
        Raises:
            MissingExtraError: `gguf` is not installed.
            UnsupportedModelError: an architecture that GGUF is not written for.
        """
        from hfcompress.formats.gguf.writer import check_gguf

        check_gguf(checkpoint)

    def scale_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Scales are chosen in 16 bits: in the checkpoint's own where it has them, else in float16."""
        return stored if stored == torch.bfloat16 else torch.float16

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return super().pack(_held_by_both(weight))

    def values(self, weight: QuantizedWeight) -> Tensor:
        return _held_by_both(weight).dequantize()

    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        refuse_cache(self.name, kv_cache)
        return PackQuantized().quantization_config(grids, untouched)

    def write_beside(self, folder: Path, name: str) -> dict[str, Any]:
        """The GGUF file, and what there is to say of it in the manifest."""
        from hfcompress.formats.gguf.writer import write_called_after_type

        return {"gguf": write_called_after_type(folder, folder, name=name)}


def _held_by_both(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight with scales that float16 and their own dtype hold; where that is none, the group is zero."""
    scales = weight.scales.float().clamp(-LARGEST, LARGEST).to(torch.float16).to(weight.scales.dtype)
    none = scales == 0
    if torch.equal(scales, weight.scales):
        return weight
    codes = weight.codes.view(len(scales), scales.shape[1], -1)
    codes = torch.where(none.unsqueeze(-1), torch.zeros_like(codes), codes).view_as(weight.codes)
    return QuantizedWeight(codes, torch.where(none, torch.ones_like(scales), scales), weight.zero_points, weight.grid)
