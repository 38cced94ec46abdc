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
"""The compressed-tensors layouts `pack-quantized` and `int-quantized`, read by transformers, vLLM and SGLang.

A symmetric weight has no zero point. The packed layout with zero points does not load by transformers' default path
(compressed-tensors 0.20 sizes `weight_zero_point` as if it were not packed), so such a checkpoint says
`"dequantize": true` in its `quantization_config`: transformers then unpacks while loading.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from hfcompress.formats.packing import pack, unpack
from hfcompress.solvers.grid import Grid, QuantizedWeight


QUANT_METHOD = "compressed-tensors"
# `version` is the library version that wrote the layout
LAYOUT_VERSION = "0.20.0"


class PackQuantized:
    """Codes of `bits` bits packed into int32 words."""

    name = "pack-quantized"
    marker = "weight_packed"

    def check(self, name: str, grid: Grid, transposed: bool) -> None:
        """
        Raises:
            InvalidValueError: this layout cannot hold the linear.
        """
        if transposed:
            raise InvalidValueError(
                f"{self.name} cannot hold {name}: it is a Conv1D, whose weight is stored transposed, and loaders unpack "
                "nn.Linear only; write plain weights with --set format=dense, or leave it alone with ignore."
            )

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of one linear by their local names."""
        grid = weight.grid
        tensors = {
            "weight_packed": pack(weight.codes, grid.bits),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if weight.zero_points is not None:
            tensors["weight_zero_point"] = pack(weight.zero_points.T, grid.bits).T.contiguous()
        return tensors

    def values(self, weight: QuantizedWeight) -> Tensor:
        """What a reader will compute with: float32 `(out_features, in_features)`."""
        return weight.dequantize()

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """The inverse of `pack`."""
        rows, columns = tensors["weight_shape"].tolist()
        zero_points = None
        if not grid.symmetric:
            zero_points = unpack(tensors["weight_zero_point"].T.contiguous(), grid.bits, rows).T.contiguous()
        codes = unpack(tensors["weight_packed"], grid.bits, columns)
        return QuantizedWeight(codes, tensors["weight_scale"], zero_points, grid)

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        """The dense values of the linear called `stem` on disk: float32 `(out_features, in_features)`."""
        return self.unpack({k: tensors[f"{stem}.{k}"] for k in _local_names(tensors, stem)}, grid).dequantize()

    def quantization_config(self, grids: Mapping[str, Grid], untouched: list[str]) -> dict[str, Any]:
        """
        The `quantization_config` of config.json.

        Args:
            grids (`Mapping[str, Grid]`): module name -> grid, for every linear on a grid.
            untouched (`list[str]`): the names of the linears that stay dense.
        """
        config = _config(self.name, grids, untouched)
        if not all(grid.symmetric for grid in grids.values()):
            if len(set(grids.values())) > 1:
                raise InvalidValueError(
                    "pack-quantized holds an asymmetric grid only when all linears share it (transformers applies one "
                    "scheme while unpacking); make them symmetric or write --set format=int-quantized."
                )
            config["dequantize"] = True
        return config


class IntQuantized(PackQuantized):
    """Codes of up to 8 bits, one byte each; zero points likewise."""

    name = "int-quantized"
    marker = "weight"

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        tensors = {"weight": weight.codes, "weight_scale": weight.scales}
        if weight.zero_points is not None:
            tensors["weight_zero_point"] = weight.zero_points
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        return QuantizedWeight(tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point"), grid)

    def quantization_config(self, grids: Mapping[str, Grid], untouched: list[str]) -> dict[str, Any]:
        return _config(self.name, grids, untouched)


def _config(name: str, grids: Mapping[str, Grid], untouched: list[str]) -> dict[str, Any]:
    """One group with the target `Linear` where all grids are one; otherwise groups that name their linears."""
    distinct = list(dict.fromkeys(grids.values()))
    groups = {}
    for index, grid in enumerate(distinct):
        targets = ["Linear"] if len(distinct) == 1 else [n for n, g in grids.items() if g == grid]
        groups[f"group_{index}"] = {
            "targets": targets,
            "weights": {
                "num_bits": grid.bits,
                "type": "int",
                "symmetric": grid.symmetric,
                "strategy": "channel" if grid.group_size == -1 else "group",
                "group_size": None if grid.group_size == -1 else grid.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": name,  # per group: where it is missing, readers infer one from the bits
        }
    return {
        "quant_method": QUANT_METHOD,
        "format": name,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": untouched,
        "version": LAYOUT_VERSION,
    }


# reading any compressed-tensors checkpoint, whoever wrote it


@dataclass(frozen=True)
class DecodedTensor:
    """
    A compressed linear that reads as the dense weight it stands for, through the consumer's own decompressor.

    Args:
        parts (`dict`): local name -> stored tensor.
        scheme: the compressed-tensors `QuantizationScheme`.
        format (`str`): the layout.
        shape (`tuple[int, int]`): of the dense weight.
    """

    parts: dict[str, Any]
    scheme: Any
    format: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts["weight_scale"].dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def read(self) -> Tensor:
        """The dense weight in float32, free of the rounding to the model's dtype."""
        from compressed_tensors.compressors import BaseCompressor

        tensors = {name: part.read() for name, part in self.parts.items()}
        tensors["weight_scale"] = tensors["weight_scale"].float()
        weight = BaseCompressor.get_value_from_registry(self.format).decompress(tensors, self.scheme)["weight"]
        assert weight is not None
        return weight

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


def decoded(tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """
    A view of a checkpoint's tensors in which compressed weights appear dense under their original names.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`dict`): the `quantization_config`.

    Raises:
        CheckpointError: the library does not understand the `quantization_config`.
        UnsupportedModelError: a layout other than pack-quantized and int-quantized.
    """
    from compressed_tensors.quantization import QuantizationConfig

    try:
        known = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "dequantize"})
    except ValueError as error:
        raise CheckpointError(
            "The quantization_config in config.json is damaged, or of another version of compressed-tensors; "
            "download or copy that file again, or update compressed-tensors."
        ) from error
    markers = {layout.name: layout.marker for layout in (PackQuantized(), IntQuantized())}
    schemes = list(known.config_groups.values())
    layout = known.format
    if layout not in markers:
        raise UnsupportedModelError(
            f"The compressed-tensors layout '{layout}' is not read yet; {', '.join(markers)} are."
        )
    view = dict(tensors)
    for stem in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        parts = {k: view.pop(f"{stem}.{k}") for k in _local_names(tensors, stem)}
        scheme = _scheme_of(stem, schemes)
        if layout == "pack-quantized":
            rows, columns = parts["weight_shape"].read().tolist()
        else:
            rows, columns = parts["weight"].shape
        view[f"{stem}.weight"] = DecodedTensor(parts, scheme, layout, (rows, columns))
    return view


def _local_names(tensors: Mapping[str, Any], stem: str) -> Iterator[str]:
    for local in ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"):
        if f"{stem}.{local}" in tensors:
            yield local


def _scheme_of(name: str, schemes: list):
    """The library's own order: an exact name (on disk it may lack the model's prefix), then a pattern, then the class."""
    from compressed_tensors.utils import match_name

    by_name = [scheme for scheme in schemes if name in scheme.targets]
    by_name += [scheme for scheme in schemes if any(target.endswith(f".{name}") for target in scheme.targets)]
    by_pattern = [scheme for scheme in schemes if any(match_name(name, target) for target in scheme.targets)]
    by_class = [scheme for scheme in schemes if "Linear" in scheme.targets]
    return (by_name + by_pattern + by_class + schemes)[0]
