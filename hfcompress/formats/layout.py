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
"""What a format is: how one linear's tensors are packed and unpacked, and the lines of config.json that name it."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hfcompress.errors import InvalidValueError
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


class Layout(Protocol):
    """The names and functions of one format."""

    @property
    def name(self) -> str:
        """What a recipe calls it."""
        ...

    @property
    def quant_method(self) -> str | None:
        """What config.json calls its family; `None` for an ordinary checkpoint."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """What transformers needs beside itself to load it."""
        ...

    def check(self, shape: LinearShape, grid: Grid) -> None:
        """
        Raises:
            InvalidValueError: this layout cannot hold the linear.
        """

    def scale_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype that scales are kept in, for a weight whose dtype on disk was `stored`."""
        ...

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of one linear by their local names."""
        ...

    def values(self, weight: QuantizedWeight) -> Tensor:
        """What a reader will compute with: float32 `(out_features, in_features)`."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """A weight of the same values as the one that was packed."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        """The dense values of the linear called `stem` on disk: float32 `(out_features, in_features)`."""
        ...

    def quantization_config(self, grids: Mapping[str, Grid], untouched: list[str]) -> dict[str, Any] | None:
        """
        The `quantization_config` of config.json, or `None` for an ordinary checkpoint.

        Args:
            grids (`Mapping[str, Grid]`): module name -> grid, for every linear on a grid.
            untouched (`list[str]`): the names of the linears that stay dense.

        Raises:
            InvalidValueError: this layout cannot hold such a set of linears.
        """
        ...

    def files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """JSON files that belong beside config.json, given the `quantization_config`: name -> contents."""
        ...


def refuse_conv1d(layout: str, shape: LinearShape) -> None:
    """
    Raises:
        InvalidValueError: the linear is a `Conv1D`.
    """
    if shape.transposed:
        raise InvalidValueError(
            f"{layout} cannot hold {shape.name}: it is a Conv1D, whose weight is stored transposed, and loaders unpack "
            "nn.Linear only; write plain weights with --set format=dense, or leave it alone with ignore."
        )
