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
The GPTQ layout of AutoGPTQ, in its two versions, read by transformers (through gptqmodel and optimum), vLLM and SGLang.

`qweight` int32 `(in_features * bits / 32, out_features)` holds codes from 0 up, packed along the inputs; `qzeros` int32
`(groups, out_features * bits / 32)` zero points, packed along the outputs; `scales` float16 `(groups, out_features)`;
`g_idx` int32 `(in_features,)` the group of each input. Version 1 stores a zero point less one, so that it has no place
for zero (readers that add one to a whole word and readers that add one to each field then disagree). A group whose zero
point is zero is therefore turned round, which changes no value:
`(q - z) * s == ((qmax - q) - (qmax - z)) * -s`, with `qmax = 2**bits - 1`.

GPTQModel's own loader takes version 1 with zero points from its own quantizer alone; transformers takes it from anyone.
`gptq_v2` has neither limit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfcompress.errors import UnsupportedModelError
from hfcompress.formats.one_grid import OneGrid, half_scales, zeros_of
from hfcompress.formats.packing import WORD, pack, unpack
from hfcompress.formats.stored import PackedTensor, packed_stems
from hfcompress.solvers.grid import Grid, QuantizedWeight


QUANT_METHOD = "gptq"


class GPTQ(OneGrid):
    """Version 1, `checkpoint_format: gptq`: the one that everything reads."""

    name: ClassVar[str] = "gptq"
    quant_method: ClassVar[str | None] = QUANT_METHOD
    packages: ClassVar[tuple[str, ...]] = ("gptqmodel", "optimum")
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    multiples: ClassVar[tuple[int, int]] = (32, 32)
    locals: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    offset: ClassVar[int] = 1  # what is stored is the zero point less this

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        bits = weight.grid.bits
        if self.offset and weight.zero_points is not None:
            weight = _turned_round(weight, weight.zero_points == weight.grid.q_min)
        in_features = weight.codes.shape[1]
        zeros = zeros_of(weight).T - self.offset
        return {
            "qweight": pack(weight.codes, bits).T.contiguous(),
            "qzeros": pack(zeros, bits),
            "scales": half_scales(weight),
            "g_idx": regular_groups(in_features, weight.scales.shape[1]),
        }

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """A weight of the same values as the one that was packed; inputs are in the order of their groups."""
        qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
        codes = unpack(qweight.T.contiguous(), grid.bits, qweight.shape[0] * WORD // grid.bits)
        zero_points = None
        if not grid.symmetric:
            fields = unpack(qzeros, grid.bits, scales.shape[1]).int() - grid.q_min + self.offset
            zero_points = (fields % 2**grid.bits + grid.q_min).to(torch.int8).T.contiguous()
        return QuantizedWeight(codes, scales.T.contiguous(), zero_points, grid)

    def config(self, grid: Grid, blocks: str, untouched: list[str]) -> dict[str, Any]:
        """The `quantization_config` for one grid; `blocks` is the module name of the block list."""
        return {
            "quant_method": QUANT_METHOD,
            "bits": grid.bits,
            "group_size": grid.group_size,
            "desc_act": False,
            "sym": grid.symmetric,
            "lm_head": False,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "block_name_to_quantize": blocks,
            "meta": {"quantizer": [f"hfcompress:{version('hfcompress')}"]},
        }

    def files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """AutoGPTQ's file, which GPTQModel and older runtimes look for."""
        return {"quantize_config.json": config}


class GPTQv2(GPTQ):
    """Version 2, `checkpoint_format: gptq_v2`: zero points are stored as they are."""

    name: ClassVar[str] = "gptq_v2"
    offset: ClassVar[int] = 0


def regular_groups(in_features: int, groups: int) -> Tensor:
    """`g_idx` of consecutive groups: int32 `(in_features,)`."""
    return (torch.arange(in_features) // (in_features // groups)).to(torch.int32)


def _turned_round(weight: QuantizedWeight, where: Tensor) -> QuantizedWeight:
    """The same values with codes, zero points and scales mirrored in the groups `where` `(out_features, groups)`."""
    assert weight.zero_points is not None
    columns = weight.codes.shape[1] // weight.scales.shape[1]
    return QuantizedWeight(
        torch.where(where.repeat_interleave(columns, dim=1), -1 - weight.codes, weight.codes),
        torch.where(where, -weight.scales, weight.scales),
        torch.where(where, -1 - weight.zero_points, weight.zero_points),
        weight.grid,
    )


# reading any GPTQ checkpoint, whoever wrote it


@dataclass(frozen=True)
class GPTQTensor(PackedTensor):
    """A linear in the GPTQ layout; its inputs may be grouped in any order (`desc_act`)."""

    def read(self) -> Tensor:
        """The dense weight in float32."""
        tensors = self.tensors()
        weight = self.layout.unpack(tensors, self.grid)
        groups = tensors.get("g_idx")
        if groups is None or self._regular(groups):
            return weight.dequantize()
        order = groups.long()
        zeros = zeros_of(weight).float()[:, order]
        return (weight.codes.float() - zeros) * weight.scales.float()[:, order]

    def quantized(self) -> QuantizedWeight:
        """
        The codes and scales.

        Raises:
            UnsupportedModelError: the groups are not consecutive inputs.
        """
        tensors = self.tensors()
        if "g_idx" in tensors and not self._regular(tensors["g_idx"]):
            raise UnsupportedModelError(
                "The groups of this GPTQ checkpoint are not consecutive inputs (desc_act), which no other format holds; "
                "compress the original model again."
            )
        return self.layout.unpack(tensors, self.grid)

    def _regular(self, groups: Tensor) -> bool:
        return torch.equal(groups, regular_groups(len(groups), self.parts["scales"].shape[0]))


def decoded(tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """
    A view of a GPTQ checkpoint's tensors in which compressed weights appear dense under their original names.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`dict`): the `quantization_config`.

    Raises:
        UnsupportedModelError: a variant that is not AutoGPTQ's layout in words of 32 bits.
    """
    layouts = {layout.name: layout for layout in (GPTQ(), GPTQv2())}
    variant = config.get("checkpoint_format") or config.get("format") or "gptq"
    if variant not in layouts or config.get("pack_dtype", "int32") != "int32":
        raise UnsupportedModelError(
            f"The GPTQ layout '{variant}' in words of {config.get('pack_dtype', 'int32')} is not read yet; "
            f"{', '.join(layouts)} in int32 are."
        )
    view = dict(tensors)
    for stem in packed_stems(tensors, "qweight"):
        parts = {k: view.pop(f"{stem}.{k}") for k in GPTQ.locals if k != "g_idx" or f"{stem}.g_idx" in tensors}
        words, rows = parts["qweight"].shape
        bits = int(config["bits"])
        columns = words * WORD // bits
        if "g_idx" in parts:  # where a linear has bits of its own (GPTQModel's `dynamic`), its shape says so
            [columns] = parts["g_idx"].shape
            bits = words * WORD // columns
        groups = parts["scales"].shape[0]
        grid = Grid(bits, -1 if groups == 1 else columns // groups, bool(config.get("sym", True)))
        view[f"{stem}.weight"] = GPTQTensor(parts, grid, layouts[variant], (rows, columns))
    return view
