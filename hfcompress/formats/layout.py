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

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfcompress.errors import InvalidValueError
from hfcompress.models.fused_experts import ExpertStorage
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


class Layout(ABC):
    """
    The base of the formats.

    Attributes:
        name (`str`): what a recipe calls it.
        quant_method (`str` or `None`): what config.json calls its family; `None` for an ordinary checkpoint.
        packages (`tuple[str, ...]`): what transformers needs beside itself to load it.
        plugin (`str` or `None`): the module of hfcompress that teaches it to transformers.
        codes_beside (`bool`): whether [`Layout.beside`] makes something else of a tensor.
        merges_experts (`bool`): whether its reader puts experts together that transformers finds in a checkpoint together alone.
    """

    name: ClassVar[str]
    quant_method: ClassVar[str | None]
    packages: ClassVar[tuple[str, ...]]
    plugin: ClassVar[str | None] = None
    codes_beside: ClassVar[bool] = False
    merges_experts: ClassVar[bool] = False

    def check_model(self, checkpoint: Any) -> None:  # noqa: B027 (most hold every model)
        """
        Raises:
            HfcompressError: this format cannot hold the model.
        """

    def of(self, grid: Grid) -> "Layout":
        """The layout that holds linears on a grid: this one, or plain weights where nothing is rounded."""
        from hfcompress.formats.dense import Dense  # which is a layout

        return Dense() if grid.is_plain else self

    def hides_weight(self, grid: Grid) -> bool:
        """Whether a linear on this grid has no `weight` while transformers builds and loads the model."""
        return False

    @abstractmethod
    def check(self, shape: LinearShape, grid: Grid) -> None:
        """
        Raises:
            InvalidValueError: this format cannot hold the linear.
        """

    def check_coded(self, name: str, grid: Grid) -> None:
        """
        Raises:
            InvalidValueError: the linear is entropy-coded, has a codebook or is a product, which this format cannot hold.
        """
        kind = {
            "coded": "entropy-coded weights",
            "codebook": "codebooks",
            "vector": "vectors",
            "factors": "factors",
        }.get(grid.type)
        if kind is not None:
            raise InvalidValueError(
                f"{self.name} has no place for {kind}, which {name} has; leave the format at hfcompress, or "
                "write plain weights with the format dense."
            )

    def check_pattern(self, name: str, pattern: str | None) -> None:  # noqa: B027 (most hold any)
        """
        Raises:
            InvalidValueError: this format cannot hold a linear whose zeros lie so.
        """

    def check_experts(self, grids: Mapping[str, Grid | None]) -> None:
        """
        Args:
            grids (`Mapping`): linear of an expert -> its grid, or `None` where it is left alone; of all experts of the model.

        Raises:
            InvalidValueError: this format cannot hold them, or its reader would not find them.
        """
        if grids:
            raise InvalidValueError(
                f"{self.name} has no place for the experts of a mixture, such as {next(iter(grids))}; write --set "
                "format=compressed-tensors, or plain weights with --set format=dense."
            )

    def check_together(self, grids: Mapping[str, Grid | None]) -> None:
        """
        Args:
            grids (`Mapping`): as in [`check_experts`], of a model whose experts transformers finds together alone.

        Raises:
            InvalidValueError: this format cannot hold them, or its reader would not find them.
        """
        coded = next((name for name, grid in grids.items() if grid is not None), None)
        if coded is not None:
            raise InvalidValueError(
                f"{coded} is of an expert, which transformers finds in a checkpoint of this model only together with the others "
                f"in one tensor, and {self.name} has no place for that; write --set format=hfcompress, plain weights with --set "
                "format=dense, or leave experts alone with ignore: [re:.*experts.*]."
            )

    def storage(self, experts: ExpertStorage) -> ExpertStorage:
        """How the experts of a model lie in what is written, given how they are stored."""
        return experts.biases if self.merges_experts else experts

    def check_values(self, name: str, weight: QuantizedWeight) -> None:  # noqa: B027 (most hold any)
        """
        Raises:
            InvalidValueError: this format cannot hold a linear with such values.
        """

    def check_embeddings(self, name: str, grid: Grid) -> None:
        """
        Raises:
            InvalidValueError: this format cannot hold input embeddings on a grid.
        """
        raise InvalidValueError(
            f"{self.name} has no place for quantized embeddings; take {name} out of targets, or write --set "
            "format=compressed-tensors."
        )

    def scale_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype that scales are chosen and stored in, for a weight that is stored in `stored`."""
        return stored

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of one linear by their local names."""

    def expected(self, shape: LinearShape, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
        """
        What [`Layout.pack`] will make of a linear, without values: tensors on the device `meta`.

        Args:
            shape (`LinearShape`): the linear.
            grid (`Grid`): its grid.
            dtype (`torch.dtype`): of its scales.
        """
        groups = shape.in_features // grid.columns(shape.in_features)
        codes = torch.empty(shape.out_features, shape.in_features, dtype=torch.int8, device="meta")
        scales = torch.empty(shape.out_features, groups, dtype=dtype, device="meta")
        zeros = None if grid.symmetric else torch.empty_like(scales, dtype=torch.int8)
        return self.pack(QuantizedWeight(codes, scales, zeros, grid))

    def beside(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is written of a tensor that lies outside the blocks and is left alone, by names on disk."""
        return {name: tensor}

    def values(self, weight: QuantizedWeight) -> Tensor:
        """What a reader will compute with: float32 `(out_features, in_features)`."""
        return weight.dequantize()

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """A weight of the same values as the one that was packed."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        """The dense values of the linear called `stem` on disk: float32 `(out_features, in_features)`."""

    @abstractmethod
    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any] | None:
        """
        The `quantization_config` of config.json, or `None` for an ordinary checkpoint.

        Args:
            grids (`Mapping[str, Grid]`): module name -> grid, for every linear on a grid.
            untouched (`list[str]`): the names of the linears that stay dense.
            kv_cache (`str`, *optional*): `"int"` or `"float"`, the 8-bit codes of the key-value cache.

        Raises:
            InvalidValueError: this format cannot hold these linears together, or has no place for such a cache.
        """

    def config_unpacked(self, config: dict[str, Any] | None, grids: Mapping[str, Grid]) -> dict[str, Any] | None:
        """
        The `quantization_config` of a model that takes no packed weights, so that transformers must unpack them while it loads.

        Args:
            config (`dict` or `None`): what [`Layout.quantization_config`] says of the same `grids`.
            grids (`Mapping[str, Grid]`): module name -> grid.

        Raises:
            InvalidValueError: this format cannot hold them so.
        """
        return config

    def config_with_embeddings(
        self, config: dict[str, Any] | None, grids: Mapping[str, Grid], embeddings: Collection[str]
    ) -> dict[str, Any] | None:
        """
        The `quantization_config` where input embeddings are on a grid too.

        Args:
            config (`dict` or `None`): what [`Layout.quantization_config`] says of the same `grids`.
            grids (`Mapping[str, Grid]`): module name -> grid, the embeddings among them.
            embeddings (`Collection[str]`): which of them are embeddings; none is nothing to change.

        Raises:
            InvalidValueError: this format cannot hold them together.
        """
        return config

    def files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """JSON files that belong beside config.json, given the `quantization_config`: name -> contents."""
        return {}

    def write_beside(self, folder: Path, name: str) -> dict[str, Any]:
        """
        Write what is made from the finished folder and belongs into it.

        Args:
            folder (`Path`): complete but for the manifest and the report.
            name (`str`): what the folder will be called.

        Returns:
            `dict`: what the manifest says of it.
        """
        return {}


def kind_of(grid: Grid) -> str:
    """What a grid's codes are, and what is done to the inputs: `int codes and rounded inputs`."""
    if grid.is_plain:
        return "plain weights"
    return f"{grid.type} codes" if grid.activations == "none" else f"{grid.type} codes and rounded inputs"


def require_all_experts(layout: str, grids: Mapping[str, Grid | None]) -> None:
    """
    Raises:
        InvalidValueError: some linears of experts are left alone; a reader that merges experts takes all of them or none.
    """
    alone = next((name for name, grid in grids.items() if grid is None), None)
    if alone is not None:
        raise InvalidValueError(
            f"{alone} would stay dense, and transformers reads experts from {layout} only where all of them are compressed; "
            "compress all experts, or write plain weights with --set format=dense."
        )


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


def refuse_cache(layout: str, kv_cache: str | None) -> None:
    """
    Raises:
        InvalidValueError: a key-value cache is to be rounded.
    """
    if kv_cache is not None:
        raise InvalidValueError(
            f"The format {layout} has no place for the scales of the step kv_cache; leave the format at "
            "compressed-tensors, or leave out that step."
        )
