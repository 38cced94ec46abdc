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
What GPTQ and AWQ have in common: one grid for every linear of the blocks, float16 scales, matrices stored input-major.

Their `quantization_config` holds one number of bits and one group size, and transformers replaces every linear of the
block list when it loads (optimum's `convert_model`; AWQ's `modules_to_not_convert` matches parts of names), and none
outside of it. So a recipe that leaves some of them dense, or that mixes grids, is refused. Consumers dequantize by plain
multiplication, so that a negative scale is as good as a positive one.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfcompress.errors import InvalidValueError
from hfcompress.formats.layout import Layout, kind_of, refuse_cache, refuse_conv1d
from hfcompress.models.names import block_list
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


class OneGrid(Layout):
    """The base of such a layout, which adds `pack`, `unpack` and `config`."""

    bits: ClassVar[tuple[int, ...]]
    multiples: ClassVar[tuple[int, int]]  # of out_features and in_features, that words be full
    locals: ClassVar[tuple[str, ...]]  # the local names of a packed linear

    def check(self, shape: LinearShape, grid: Grid) -> None:
        if grid.type != "int" or grid.activations != "none":
            raise InvalidValueError(
                f"{self.name} is not for {kind_of(grid)}, which {shape.name} has; leave the format at compressed-tensors."
            )
        refuse_conv1d(self.name, shape)
        if grid.bits not in self.bits:
            held = " or ".join(str(bits) for bits in self.bits)
            raise InvalidValueError(
                f"{self.name} holds {held} bits, and {shape.name} is given {grid.bits}; "
                "choose other bits, or write --set format=compressed-tensors."
            )
        for size, multiple in zip((shape.out_features, shape.in_features), self.multiples, strict=True):
            if size % multiple:
                raise InvalidValueError(
                    f"{self.name} cannot hold {shape.name}, which is {shape.out_features} by {shape.in_features}: "
                    f"{size} is no multiple of {multiple}; write --set format=compressed-tensors."
                )

    def scale_dtype(self, stored: torch.dtype) -> torch.dtype:
        """float16: what the consumers' kernels are given."""
        return torch.float16

    def values(self, weight: QuantizedWeight) -> Tensor:
        return QuantizedWeight(weight.codes, weight.scales.half(), weight.zero_points, weight.grid).dequantize()

    @abstractmethod
    def config(self, grid: Grid, blocks: str, untouched: list[str]) -> dict[str, Any]:
        """The `quantization_config` for one grid; `blocks` is the module name of the block list."""

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        return self.unpack({name: tensors[f"{stem}.{name}"] for name in self.locals}, grid).dequantize()

    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        """
        The `quantization_config` of config.json; see [`Layout`].

        Raises:
            InvalidValueError: the linears of the blocks are not all on one grid, one outside of them is on it, or a
                cache is to be rounded.
        """
        refuse_cache(self.name, kv_cache)
        lists = {block_list(name): name for name in grids}
        if None in lists:
            raise InvalidValueError(
                f"{self.name} cannot hold {lists[None]}: transformers replaces the linears of the blocks only when it "
                "loads it; take it out of targets, or write --set format=compressed-tensors."
            )
        left = [name for name in untouched if block_list(name) in lists]
        if left:
            raise InvalidValueError(
                f"{self.name} takes all linears of the blocks or none, and {left[0]} would stay dense; compress it too, "
                "or write --set format=compressed-tensors."
            )
        distinct = list(dict.fromkeys(grids.values()))
        if len(distinct) > 1:
            first, other = (next(name for name, grid in grids.items() if grid == wanted) for wanted in distinct[:2])
            raise InvalidValueError(
                f"{self.name} holds one grid (bits, group size, zero points) for all linears, and {first} and {other} "
                "differ; give them the same, or write --set format=compressed-tensors."
            )
        if len(lists) > 1:
            raise InvalidValueError(
                f"{self.name} holds one list of blocks, and this model has an encoder's and a decoder's; write --set "
                "format=compressed-tensors, or --set format=hfcompress."
            )
        [stem] = lists
        return self.config(distinct[0], str(stem), untouched)


def half_scales(weight: QuantizedWeight) -> Tensor:
    """The scales as they are stored: float16 `(groups, out_features)`."""
    return weight.scales.half().T.contiguous()


def zeros_of(weight: QuantizedWeight) -> Tensor:
    """Signed zero points `(out_features, groups)`, int8; zeros on a symmetric grid."""
    return torch.zeros_like(weight.scales, dtype=torch.int8) if weight.zero_points is None else weight.zero_points
