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
"""Plain weights that lie on a grid: nothing is saved in bytes, and anything that loads the model loads the result."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import InvalidValueError
from hfcompress.formats.layout import Layout, refuse_cache
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


class Dense(Layout):
    """
    The dequantized weight; there is no `quantization_config`.

    Args:
        dtype (`torch.dtype`, *optional*): what it is rounded to; the dtype of its scales if not given.
    """

    name = "dense"
    quant_method = None
    packages = ()

    def __init__(self, dtype: torch.dtype | None = None):
        self.dtype = dtype

    def of(self, grid: Grid) -> Layout:
        """Itself: it holds any weight."""
        return self

    def check(self, shape: LinearShape, grid: Grid) -> None:
        """
        Any grid fits, but there is no place for what is done to the inputs.

        Raises:
            InvalidValueError: the linear's inputs are to be rounded.
        """
        if grid.activations != "none":
            raise InvalidValueError(
                f"The format dense has no place for how the inputs of {shape.name} are rounded; leave the format at "
                "compressed-tensors, or set activations to none."
            )

    def check_coded(self, name: str, grid: Grid) -> None:
        """Any grid fits."""

    def check_experts(self, grids: Mapping[str, Grid | None]) -> None:
        """They are as any other weight."""

    def check_together(self, grids: Mapping[str, Grid | None]) -> None:
        """They are as any other weight."""

    def check_embeddings(self, name: str, grid: Grid) -> None:
        """Any grid fits."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {"weight": weight.dequantize().to(self.dtype or weight.scales.dtype)}

    def values(self, weight: QuantizedWeight) -> Tensor:
        return weight.dequantize().to(self.dtype or weight.scales.dtype).float()

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """
        Raises:
            InvalidValueError: always; plain weights have no codes.
        """
        raise InvalidValueError("Plain weights hold no codes; give a checkpoint in a quantized format.")

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        weight = tensors[f"{stem}.weight"].float()
        return weight.T if transposed else weight

    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any] | None:
        """None: the checkpoint is an ordinary one."""
        refuse_cache(self.name, kv_cache)
        return None
