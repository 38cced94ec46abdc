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
The AWQ layout called GEMM, of AutoAWQ, read by transformers (through gptqmodel), vLLM and SGLang.

`qweight` int32 `(in_features, out_features / 8)` and `qzeros` int32 `(groups, out_features / 8)` are packed along the
outputs, eight at a time in the order [`ORDER`]; `scales` float16 `(groups, out_features)`. Codes and zero points are
stored from 0 up, and the zero points as they are: on a symmetric grid all are 8.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from hfcompress.errors import UnsupportedModelError
from hfcompress.formats.one_grid import OneGrid, half_scales, zeros_of
from hfcompress.formats.packing import pack, unpack
from hfcompress.formats.stored import PackedTensor, packed_stems
from hfcompress.solvers.grid import Grid, QuantizedWeight


QUANT_METHOD = "awq"
BITS = 4
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight neighbours comes first, second, ... in a word
PLACE = [ORDER.index(neighbour) for neighbour in range(8)]


class AWQ(OneGrid):
    """4 bits, with or without zero points."""

    name: ClassVar[str] = "awq"
    quant_method: ClassVar[str | None] = QUANT_METHOD
    packages: ClassVar[tuple[str, ...]] = ("gptqmodel",)
    bits: ClassVar[tuple[int, ...]] = (BITS,)
    multiples: ClassVar[tuple[int, int]] = (32, 32)
    locals: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {
            "qweight": pack(_reordered(weight.codes.T, ORDER), BITS),
            "qzeros": pack(_reordered(zeros_of(weight).T, ORDER), BITS),
            "scales": half_scales(weight),
        }

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        scales = tensors["scales"]
        codes, zeros = (
            _reordered(unpack(tensors[name], BITS, scales.shape[1]), PLACE).T.contiguous()
            for name in ("qweight", "qzeros")
        )
        return QuantizedWeight(codes, scales.T.contiguous(), None if grid.symmetric else zeros, grid)

    def config(self, grid: Grid, blocks: str, untouched: list[str]) -> dict[str, Any]:
        """The `quantization_config` for one grid."""
        return {
            "quant_method": QUANT_METHOD,
            "bits": BITS,
            "group_size": grid.group_size,
            "zero_point": True,  # they are there, and all 8 on a symmetric grid
            "version": "gemm",
            "sym": grid.symmetric,
            "modules_to_not_convert": untouched or None,
        }


def _reordered(values: Tensor, order: list[int]) -> Tensor:
    """Every eight neighbours of the last dimension in another order."""
    rows, columns = values.shape
    return values.reshape(rows, columns // 8, 8)[..., order].reshape(rows, columns)


# reading any AWQ checkpoint, whoever wrote it


def decoded(tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """
    A view of an AWQ checkpoint's tensors in which compressed weights appear dense under their original names.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`dict`): the `quantization_config`.

    Raises:
        UnsupportedModelError: a layout other than GEMM, or other than 4 bits.
    """
    variant = str(config.get("version") or config.get("format") or "gemm").lower()
    if variant != "gemm" or int(config.get("bits", BITS)) != BITS:
        raise UnsupportedModelError(
            f"The AWQ layout '{variant}' with {config.get('bits', BITS)} bits is not read yet; gemm with {BITS} bits is."
        )
    view = dict(tensors)
    for stem in packed_stems(tensors, "qweight"):
        parts = {k: view.pop(f"{stem}.{k}") for k in AWQ.locals}
        columns = parts["qweight"].shape[0]
        groups, rows = parts["scales"].shape
        grid = Grid(BITS, -1 if groups == 1 else columns // groups, bool(config.get("sym", False)))
        view[f"{stem}.weight"] = PackedTensor(parts, grid, AWQ(), (rows, columns))
    return view
