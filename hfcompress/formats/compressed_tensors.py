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
"""The compressed-tensors layouts, read by transformers, vLLM and SGLang: `pack-quantized` for weights alone,
`int-quantized` and `float-quantized` where the inputs are rounded too, or the weights are E4M3.

A symmetric weight has no zero point. The packed layout with zero points does not load by transformers' default path
(compressed-tensors 0.20 sizes `weight_zero_point` as if it were not packed), so such a checkpoint says
`"dequantize": true` in its `quantization_config`: transformers then unpacks while loading. So does one with quantized
input embeddings, of which the default path loads neither packed ones nor any that the output head shares, one whose
modules initialize weights of others, and one with an encoder and a decoder: generating runs the encoder before the
model's forward, where the default path unpacks. What is unpacked while loading is read by one scheme, the first, and rounds no activations: packed weights must share a grid,
those of one byte a group size, and what does not load is refused.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from hfcompress.formats.layout import Layout, kind_of, refuse_conv1d, require_all_experts
from hfcompress.formats.packing import pack, unpack
from hfcompress.formats.stored import PackedTensor, packed_stems
from hfcompress.models.names import pattern_of_experts
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


QUANT_METHOD = "compressed-tensors"
# `version` is the library version that wrote the layout
LAYOUT_VERSION = "0.20.0"
MIXED = "mixed-precision"  # what the whole is called where groups differ in their layout


class PackQuantized(Layout):
    """Codes of `bits` bits packed into int32 words."""

    name = "pack-quantized"
    quant_method = QUANT_METHOD
    packages = ("compressed-tensors",)

    def hides_weight(self, grid: Grid) -> bool:
        return grid.symmetric  # others are unpacked while they are loaded

    def check(self, shape: LinearShape, grid: Grid) -> None:
        if grid.is_plain:
            raise InvalidValueError(
                f"{shape.name} holds plain weights, which have no codes for {self.name}; give --format dense, or quantize them."
            )
        if not self.suits(grid):
            raise InvalidValueError(
                f"{self.name} is not for {kind_of(grid)}, which {shape.name} has; leave the format at compressed-tensors, "
                f"which writes {CompressedTensors.layout_of(grid).name} there."
            )
        refuse_conv1d(self.name, shape)

    def check_embeddings(self, name: str, grid: Grid) -> None:
        if grid.type != "int" or grid.activations != "none":
            raise InvalidValueError(
                f"{name} is looked up by token ids and holds {kind_of(grid)} nowhere; give it a step of its own whose type "
                f"is int and whose activations are none, such as rtn with targets: [{name.rpartition('.')[2]}]."
            )

    def check_experts(self, grids: Mapping[str, Grid | None]) -> None:
        require_all_experts(self.name, grids)
        distinct = list(dict.fromkeys(grid for grid in grids.values() if grid is not None))
        first = next(iter(grids), "")
        if len(distinct) > 1:
            raise InvalidValueError(
                f"transformers reads all experts by one scheme, and those of this recipe are on {len(distinct)} grids; give "
                f"experts such as {first} the same settings, or write plain weights with --set format=dense."
            )
        for grid in distinct:
            if grid.activations != "none" or not grid.symmetric:
                asked = "zero points" if grid.activations == "none" else "rounded inputs"
                raise InvalidValueError(
                    f"transformers reads experts with {asked} from no layout of compressed-tensors, and {first} has them; set "
                    "symmetric to true and activations to none, or give experts a step of their own that does."
                )

    def suits(self, grid: Grid) -> bool:
        """Whether readers take this layout for such a linear."""
        return grid.type == "int" and grid.activations == "none"

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        grid = weight.grid
        tensors = {
            "weight_packed": pack(weight.codes, grid.bits),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if weight.zero_points is not None:
            tensors["weight_zero_point"] = pack(weight.zero_points.T, grid.bits).T.contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        rows, columns = tensors["weight_shape"].tolist()
        zero_points = None
        if not grid.symmetric:
            zero_points = unpack(tensors["weight_zero_point"].T.contiguous(), grid.bits, rows).T.contiguous()
        codes = unpack(tensors["weight_packed"], grid.bits, columns)
        return QuantizedWeight(codes, tensors["weight_scale"], zero_points, grid)

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        return self.unpack({k: tensors[f"{stem}.{k}"] for k in _local_names(tensors, stem)}, grid).dequantize()

    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        config = _config(lambda grid: self.name, grids, untouched, kv_cache)
        if not all(grid.symmetric for grid in grids.values()):
            if len(set(grids.values())) > 1:
                raise InvalidValueError(
                    "pack-quantized holds an asymmetric grid only when all linears share it (transformers applies one "
                    "scheme while unpacking); make them symmetric or write --set format=int-quantized."
                )
            if kv_cache is not None:
                raise InvalidValueError(
                    "pack-quantized cannot hold an asymmetric grid beside the step kv_cache (transformers unpacks such "
                    "weights while loading and forgets the rest); make them symmetric or write "
                    "--set format=int-quantized."
                )
            config["dequantize"] = True
        return config

    def config_with_embeddings(
        self, config: dict[str, Any] | None, grids: Mapping[str, Grid], embeddings: Collection[str]
    ) -> dict[str, Any] | None:
        if config is None or not embeddings:
            return config
        names = " and ".join(embeddings)
        _require_one_scheme(
            config,
            grids,
            "Beside quantized embeddings transformers unpacks",
            f"take {names} out of targets, or ",
            f"{self.name} holds embeddings only %s of the linears, and that of {names} or of a linear",
        )
        groups = config["config_groups"]
        if len(groups) == 1:
            linears = ["Linear"] if len(grids) > len(embeddings) else []
            groups = {name: {**group, "targets": [*linears, *embeddings]} for name, group in groups.items()}
        return {**config, "config_groups": groups, "dequantize": True}

    def config_unpacked(self, config: dict[str, Any] | None, grids: Mapping[str, Grid]) -> dict[str, Any] | None:
        if config is None:
            return None
        _require_one_scheme(
            config,
            grids,
            "Of this architecture transformers has to unpack",
            "",
            f"{self.name} holds linears of this architecture only %s of one another, and that of some",
        )
        return {**config, "dequantize": True}


def _require_one_scheme(
    config: Mapping[str, Any], grids: Mapping[str, Grid], unpacks: str, instead: str, differs: str
) -> None:
    """
    Raises:
        InvalidValueError: transformers cannot take all that for one scheme, as it does where it unpacks weights while loading.
    """
    groups = config["config_groups"].values()
    if config.get("kv_cache_scheme") or any(group["input_activations"] for group in groups):
        raise InvalidValueError(
            f"{unpacks} all weights while loading and rounds neither inputs nor the key-value cache; {instead}leave activations "
            "at none and out the step kv_cache."
        )
    if config["format"] == "int-quantized":
        if len({grid.group_size for grid in grids.values()}) > 1:
            raise InvalidValueError(
                f"{differs % 'at the group_size'} differs (transformers applies one scheme while unpacking); set them alike, -1 for "
                "whole rows."
            )
    elif len(groups) > 1:
        raise InvalidValueError(
            f"{differs % 'on the grid'} differs (transformers applies one scheme while unpacking); set bits, group_size, symmetric "
            "and type alike, or write --set format=int-quantized, to which other bits are no matter."
        )


class IntQuantized(PackQuantized):
    """Codes of up to 8 bits, one byte each; zero points likewise."""

    name = "int-quantized"

    def hides_weight(self, grid: Grid) -> bool:
        return False

    def suits(self, grid: Grid) -> bool:
        return grid.type == "int"

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        tensors = {"weight": weight.codes, "weight_scale": weight.scales}
        if weight.zero_points is not None:
            tensors["weight_zero_point"] = weight.zero_points
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        return QuantizedWeight(tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point"), grid)

    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        return _config(lambda grid: self.name, grids, untouched, kv_cache)


class FloatQuantized(IntQuantized):
    """E4M3 codes, one byte each."""

    name = "float-quantized"

    def suits(self, grid: Grid) -> bool:
        return grid.type == "float"


LAYOUTS = (PackQuantized(), IntQuantized(), FloatQuantized())


class CompressedTensors(PackQuantized):
    """
    Of the layouts above the first that suits each linear: the packed one for integer weights alone, 8-bit included,
    otherwise the one that vLLM expects of a linear with rounded inputs or E4M3 weights.
    """

    name = "compressed-tensors"

    @staticmethod
    def layout_of(grid: Grid) -> PackQuantized:
        """The layout for such a linear."""
        return next(layout for layout in LAYOUTS if layout.suits(grid))

    def check(self, shape: LinearShape, grid: Grid) -> None:
        (super() if grid.is_plain else self.layout_of(grid)).check(shape, grid)

    def hides_weight(self, grid: Grid) -> bool:
        return self.layout_of(grid).hides_weight(grid)

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return self.layout_of(weight.grid).pack(weight)

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        return self.layout_of(grid).unpack(tensors, grid)

    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        layouts = {self.layout_of(grid) for grid in grids.values()}
        if PackQuantized.name in {layout.name for layout in layouts}:
            PackQuantized().quantization_config(grids, untouched, kv_cache)  # refuses what its readers cannot take
        if len(layouts) == 1:
            return layouts.pop().quantization_config(grids, untouched, kv_cache)
        return _config(lambda grid: self.layout_of(grid).name, grids, untouched, kv_cache)


def _config(
    layout_name: Callable[[Grid], str], grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None
) -> dict[str, Any]:
    """One group with the target `Linear` where all grids are one; otherwise groups that name their linears."""
    distinct = list(dict.fromkeys(grids.values()))
    groups = {}
    for index, grid in enumerate(distinct):
        targets = ["Linear"] if len(distinct) == 1 else _targets([n for n, g in grids.items() if g == grid])
        groups[f"group_{index}"] = {
            "targets": targets,
            "weights": {
                "num_bits": grid.bits,
                "type": grid.type,
                "symmetric": grid.symmetric,
                "strategy": "channel" if grid.group_size == -1 else "group",
                "group_size": None if grid.group_size == -1 else grid.group_size,
                "dynamic": False,
            },
            "input_activations": _input_activations(grid),
            "output_activations": None,
            "format": layout_name(grid),  # per group: where it is missing, readers infer one from the bits
        }
    layouts = list(dict.fromkeys(group["format"] for group in groups.values()))
    config = {
        "quant_method": QUANT_METHOD,
        "format": layouts[0] if len(layouts) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": untouched,
        "version": LAYOUT_VERSION,
    }
    if kv_cache is not None:
        config["kv_cache_scheme"] = _eight_bits(kv_cache, dynamic=False)
    return config


def _targets(names: list[str]) -> list[str]:
    """Names of linears as a group names them: those of experts, which readers know by no name, by one pattern for each kind."""
    return list(dict.fromkeys(pattern_of_experts(name) or name for name in names))


def _input_activations(grid: Grid) -> dict[str, Any] | None:
    return None if grid.activations == "none" else _eight_bits(grid.type, dynamic=grid.activations == "dynamic")


def _eight_bits(type_: str, dynamic: bool) -> dict[str, Any]:
    """How activations are rounded: by a scale per token that is found on the fly, or by one that is stored."""
    return {
        "num_bits": 8,
        "type": type_,
        "symmetric": True,
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
    }


# reading any compressed-tensors checkpoint, whoever wrote it


@dataclass(frozen=True)
class CompressedTensor(PackedTensor):
    """
    A compressed linear that reads through the consumer's own decompressor.

    Args:
        scheme: the compressed-tensors `QuantizationScheme`.
    """

    scheme: Any

    def read(self) -> Tensor:
        """The dense weight in float32, free of the rounding to the model's dtype."""
        from compressed_tensors.compressors import BaseCompressor

        tensors: dict[str, Tensor | None] = {**self.tensors()}
        tensors["weight_scale"] = self.parts["weight_scale"].read().float()
        weight = BaseCompressor.get_value_from_registry(self.layout.name).decompress(tensors, self.scheme)["weight"]
        assert weight is not None
        return weight

    def quantized(self) -> QuantizedWeight:
        """
        The codes themselves, on their grid.

        Raises:
            UnsupportedModelError: a grid other than one scale per row, or per row and group of neighbouring columns.
        """
        weights = self.scheme.weights
        if weights.strategy not in ("channel", "group") or weights.actorder is not None:
            raise UnsupportedModelError(
                "A weight of this checkpoint is on a grid other than one scale per row, or per row and group of "
                "neighbouring columns; its codes cannot be read: compress the original model again."
            )
        return super().quantized()


def decoded(tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """
    A view of a checkpoint's tensors in which compressed weights appear dense under their original names.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`dict`): the `quantization_config`.

    Raises:
        CheckpointError: the library does not understand the `quantization_config`.
        UnsupportedModelError: a layout that hfcompress does not write.
    """
    from compressed_tensors.quantization import QuantizationConfig

    try:
        known = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "dequantize"})
    except ValueError as error:
        raise CheckpointError(
            "The quantization_config in config.json is damaged, or of another version of compressed-tensors; "
            "download or copy that file again, or update compressed-tensors."
        ) from error
    layouts = {layout.name: layout for layout in LAYOUTS}
    schemes: list[Any] = list(known.config_groups.values())
    for name in (known.format, *(scheme.format for scheme in schemes)):
        if name not in (*layouts, MIXED, None):
            raise UnsupportedModelError(
                f"The compressed-tensors layout '{name}' is not read yet; {', '.join(layouts)} are."
            )
    view = dict(tensors)
    for stem in packed_stems(tensors, "weight_scale"):
        parts = {k: view.pop(f"{stem}.{k}") for k in _local_names(tensors, stem)}
        scheme = _scheme_of(stem, schemes)
        if "weight_shape" in parts:
            rows, columns = parts["weight_shape"].read().tolist()
        else:
            rows, columns = parts["weight"].shape
        layout = layouts[scheme.format or known.format]
        view[f"{stem}.weight"] = CompressedTensor(parts, _grid(scheme), layout, (rows, columns), scheme)
    return view


def _grid(scheme) -> Grid:
    weights, inputs = scheme.weights, scheme.input_activations
    activations = "none" if inputs is None else "dynamic" if inputs.dynamic else "static"
    return Grid(weights.num_bits, weights.group_size or -1, weights.symmetric, weights.type, activations)


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
