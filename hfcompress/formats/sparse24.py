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
The layout `sparse24`: of every four neighbours of a 2:4 weight two, and where they stand.

`weight` holds what is kept: the values in their own dtype, `(out_features, in_features / 2)`, or the codes of an integer
grid packed into int32 words, with `weight_scale` `(out_features, groups)` beside. `weight_index` uint8
`(out_features, in_features / 8)` holds for two groups of four in each byte the two places, of 2 bits each, lowest first.
So bf16 takes 9/16 of its bytes, and 4-bit codes 3 bits a weight with their index.

The weight keeps its name and not its shape: a loader that does not know the layout stops there, and never takes it for
the weight, or for one that is missing. [`hfcompress.integrations.transformers`] teaches it to transformers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from hfcompress.formats.layout import Layout, kind_of, refuse_cache, refuse_conv1d, require_all_experts
from hfcompress.formats.packing import pack, unpack
from hfcompress.formats.stored import PackedTensor, packed_stems
from hfcompress.models.names import means
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.pattern import Pattern


QUANT_METHOD = "hfcompress-sparse24"
VERSION = 1
PATTERN = "2:4"
GROUP, KEPT = 4, 2
LOCALS = ("weight", "weight_index", "weight_scale")


class Sparse24(Layout):
    """2:4 weights, plain or on a symmetric integer grid."""

    name = "sparse24"
    quant_method = QUANT_METHOD
    packages = ()
    plugin = "hfcompress.integrations.transformers"

    def of(self, grid: Grid) -> Layout:
        """Itself: plain weights too are stored by their kept halves."""
        return self

    def check(self, shape: LinearShape, grid: Grid) -> None:
        refuse_conv1d(self.name, shape)
        if grid.activations != "none" or grid.type == "float" or not grid.symmetric:
            zeros = "" if grid.symmetric else " with zero points"
            raise InvalidValueError(
                f"{self.name} is not for {kind_of(grid)}{zeros}, which {shape.name} has; set symmetric to true, type to int "
                "and activations to none, or leave the format at compressed-tensors."
            )
        if shape.in_features % (2 * GROUP):
            raise InvalidValueError(
                f"{self.name} stores two groups of four in a byte, and {shape.name} has {shape.in_features} inputs; leave "
                "it alone with ignore, or leave the format at compressed-tensors."
            )

    def check_pattern(self, name: str, pattern: str | None) -> None:
        if pattern != PATTERN:
            raise InvalidValueError(
                f"{self.name} holds 2:4 weights alone, and {name} is to be {pattern or 'dense'}; put sparsify with the "
                "pattern 2:4 before what rounds it, or leave the format at compressed-tensors."
            )

    def check_experts(self, grids: Mapping[str, Grid | None]) -> None:
        require_all_experts(self.name, grids)

    def check_values(self, name: str, weight: QuantizedWeight) -> None:
        if not Pattern.parse(PATTERN).holds(weight.codes):
            raise InvalidValueError(
                f"{name} is not 2:4 sparse, and {self.name} holds nothing else; make such a checkpoint with `hfcompress run "
                "sparse24` or sparse24-w4a16."
            )

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        kept, index = split(weight.codes)
        if weight.grid.is_plain:
            return {"weight": kept, "weight_index": index}
        return {"weight": pack(kept, weight.grid.bits), "weight_index": index, "weight_scale": weight.scales}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        kept, index = tensors["weight"], tensors["weight_index"]
        if grid.is_plain:
            scales = torch.ones(len(kept), 1, dtype=kept.dtype, device=kept.device)
            return QuantizedWeight(join(kept, index), scales, None, grid)
        codes = unpack(kept, grid.bits, index.shape[1] * 2 * KEPT)
        return QuantizedWeight(join(codes, index), tensors["weight_scale"], None, grid)

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        found = {local: tensors[f"{stem}.{local}"] for local in LOCALS if f"{stem}.{local}" in tensors}
        return self.unpack(found, grid).dequantize()

    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        refuse_cache(self.name, kv_cache)
        groups = [
            {
                "bits": grid.bits,
                "type": grid.type,
                "group_size": grid.group_size,
                "targets": [name for name, other in grids.items() if other == grid],
            }
            for grid in dict.fromkeys(grids.values())
        ]
        return {"quant_method": QUANT_METHOD, "version": VERSION, "groups": groups, "dequantize": True}


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
        weight (`Tensor`): `(rows, columns)` of any dtype, at most two of every four neighbours other than zero.

    Returns:
        `tuple[Tensor, Tensor]`: the kept half `(rows, columns / 2)`, and where it stands, uint8 `(rows, columns / 8)`.

    Raises:
        InvalidValueError: a group holds more.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // GROUP, GROUP)
    used = groups != 0
    if (used.sum(-1) > KEPT).any():
        raise InvalidValueError("A weight that is to be stored as sparse24 is not 2:4.")
    # those that are used first, then the lowest of the others
    places = torch.argsort((~used).to(torch.uint8), dim=-1, stable=True)[..., :KEPT].sort(-1).values
    kept = groups.gather(-1, places).reshape(rows, columns // 2).contiguous()
    nibbles = (places[..., 0] | places[..., 1] << 2).view(rows, -1, 2)
    return kept, (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)


def join(kept: Tensor, index: Tensor) -> Tensor:
    """The inverse of [`split`]: `(rows, columns)`."""
    rows, half = kept.shape
    byte = index.long()
    nibbles = torch.stack([byte & 15, byte >> 4], -1).view(rows, -1)
    places = torch.stack([nibbles & 3, nibbles >> 2], -1)
    groups = kept.new_zeros(rows, half // KEPT, GROUP)
    return groups.scatter_(-1, places, kept.view(rows, -1, KEPT)).view(rows, 2 * half)


class Sparse24Tensor(PackedTensor):
    """A 2:4 linear that reads as the dense weight it stands for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, or of the scales."""
        return self.parts["weight" if self.grid.is_plain else "weight_scale"].dtype


def grid_of(group: Mapping[str, Any]) -> Grid:
    """The grid of a group of the `quantization_config`."""
    return Grid(int(group["bits"]), int(group["group_size"]), type=str(group["type"]))


def require_version(config: Mapping[str, Any]) -> None:
    """
    Raises:
        UnsupportedModelError: a later version of the layout.
    """
    if config.get("version") != VERSION:
        raise UnsupportedModelError(
            f"This checkpoint is in version {config.get('version')} of the layout sparse24, and this hfcompress reads version "
            f"{VERSION}; update hfcompress."
        )


def decoded(tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """
    A view of a checkpoint's tensors in which 2:4 weights appear dense.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`dict`): the `quantization_config`.

    Raises:
        CheckpointError: a linear that the configuration does not name.
        UnsupportedModelError: a later version of the layout.
    """
    require_version(config)
    view = dict(tensors)
    grids = {name: grid_of(group) for group in config["groups"] for name in group["targets"]}
    for stem in packed_stems(tensors, "weight_index"):
        grid = next((grid for name, grid in grids.items() if means(name, stem)), None)
        if grid is None:
            raise CheckpointError(
                f"The quantization_config does not say how {stem} is stored; download or copy config.json again."
            )
        parts = {local: view.pop(f"{stem}.{local}") for local in LOCALS if f"{stem}.{local}" in tensors}
        rows, bytes_ = parts["weight_index"].shape
        view[f"{stem}.weight"] = Sparse24Tensor(parts, grid, Sparse24(), (rows, 2 * GROUP * bytes_))
    return view
