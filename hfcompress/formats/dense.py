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

from torch import Tensor

from hfcompress.errors import InvalidValueError
from hfcompress.formats.layout import Layout
from hfcompress.solvers.grid import Grid, QuantizedWeight


class Dense(Layout):
    """The dequantized weight in the dtype of its scales; there is no `quantization_config`."""

    name = "dense"
    marker = "weight"

    def check(self, name: str, grid: Grid, transposed: bool) -> None:
        """
        Any grid fits, but there is no place for what is done to the inputs.

        Raises:
            InvalidValueError: the linear's inputs are to be rounded.
        """
        if grid.activations != "none":
            raise InvalidValueError(
                f"The format dense has no place for how the inputs of {name} are rounded; leave the format at "
                "compressed-tensors, or set activations to none."
            )

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of one linear by their local names."""
        return {"weight": weight.dequantize().to(weight.scales.dtype)}

    def values(self, weight: QuantizedWeight) -> Tensor:
        """What a reader will compute with: float32 `(out_features, in_features)`."""
        return weight.dequantize().to(weight.scales.dtype).float()

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        """The values of the linear called `stem` on disk: float32 `(out_features, in_features)`."""
        weight = tensors[f"{stem}.weight"].float()
        return weight.T if transposed else weight

    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any] | None:
        """
        None: the checkpoint is an ordinary one.

        Raises:
            InvalidValueError: a cache is to be rounded.
        """
        if kv_cache is not None:
            raise InvalidValueError(
                "The format dense has no place for the scales of the step kv_cache; leave the format at "
                "compressed-tensors, or leave out that step."
            )
        return None
