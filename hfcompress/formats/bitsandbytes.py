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
"""bitsandbytes checkpoints, read through the library's own dequantizers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import MissingExtraError


QUANT_METHOD = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__"  # and the name of the 4-bit type
NESTED = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
INT8_LEVELS = 127


@dataclass(frozen=True)
class DecodedTensor:
    """
    A compressed linear that reads as the dense weight it stands for. Of LLM.int8() that is the weight alone; that the
    library rounds the inputs too shows only where it runs the model.

    Args:
        parts (`dict`): local name -> stored tensor.
        shape (`tuple[int, int]`): of the dense weight.
        dtype (`torch.dtype`): that the library dequantizes to.
    """

    parts: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts.values())

    def read(self) -> Tensor:
        """The dense weight in float32."""
        tensors = {name: part.read() for name, part in self.parts.items()}
        if "SCB" in tensors:
            from bitsandbytes.functional import int8_vectorwise_dequant

            return int8_vectorwise_dequant(tensors["weight"], tensors["SCB"]).float()
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(tensors.pop("weight"), _quant_state(tensors)).float()

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


def decoded(tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """
    A view of a checkpoint's tensors in which compressed weights appear dense under their original names.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`dict`): the `quantization_config`.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "Reading a bitsandbytes checkpoint needs bitsandbytes: pip install 'hfcompress[bnb]'."
        ) from error
    view = dict(tensors)
    for name in tensors:
        stem, _, local = name.rpartition(".")
        if local == "SCB":
            parts = {part: view.pop(f"{stem}.{part}") for part in ("weight", "SCB")}
            view.pop(f"{stem}.weight_format", None)
            view[f"{stem}.weight"] = DecodedTensor(parts, tuple(parts["weight"].shape), torch.float32)
        elif f".{STATE}" in name:
            stem = name.partition(f".{STATE}")[0]
            locals_ = ["weight", *(part for part in NESTED if f"{stem}.{part}" in tensors), name[len(stem) + 1 :]]
            parts = {part: view.pop(f"{stem}.{part}") for part in locals_}
            state = _quant_state({part: parts[part].read() for part in locals_[1:]})
            view[f"{stem}.weight"] = DecodedTensor(parts, tuple(state.shape), state.dtype)
    return view


def _quant_state(tensors: dict[str, Tensor]):
    from bitsandbytes.functional import QuantState

    return QuantState.from_dict(dict(tensors), torch.device("cpu"))
