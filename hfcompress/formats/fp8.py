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
Reading checkpoints of E4M3 weights with a scale for every block, as DeepSeek-V3 and others are published, or for a whole weight.

`weight` is float8_e4m3fn `(out_features, in_features)`, and `weight_scale_inv` float32 `(ceil(out_features / rows),
ceil(in_features / columns))` holds what blocks of `weight_block_size` `(rows, columns)` are multiplied by; without blocks it is
one number. That kernels for such weights round what linears read, too, is left out, as it is where transformers unpacks them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.formats.stored import packed_stems


QUANT_METHOD = "fp8"
SCALE = "weight_scale_inv"


@dataclass(frozen=True)
class ScaledTensor:
    """
    Reads as the dense weight.

    Args:
        parts (`dict`): `weight` and `weight_scale_inv`, as they are stored.
        block (`tuple[int, int]` or `None`): the size of a block.
    """

    parts: dict[str, Any]
    block: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parts["weight"].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return self.parts[SCALE].dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts.values())

    def read(self) -> Tensor:
        """
        The values, float32.

        Raises:
            CheckpointError: there are more or fewer scales than blocks, or a value that is no number.
        """
        weight, scales = self.parts["weight"].read().float(), self.parts[SCALE].read().float()
        if self.block is None:
            found = weight * scales
        else:
            counts = tuple(-(-size // each) for size, each in zip(weight.shape, self.block, strict=True))
            if tuple(scales.shape) != counts:
                raise CheckpointError(
                    f"{self.parts[SCALE].name} is {tuple(scales.shape)}, and the weight has {counts} blocks; download or copy "
                    "its file again."
                )
            rows, columns = (torch.arange(size) // each for size, each in zip(weight.shape, self.block, strict=True))
            found = weight * scales[rows][:, columns]
        if not torch.isfinite(found).all():
            raise CheckpointError(f"{self.parts['weight'].name} holds NaN; download or copy its file again.")
        return found

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


def decoded(tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """
    A view of such a checkpoint's tensors in which compressed weights appear dense under their original names.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`dict`): the `quantization_config`.
    """
    block = config.get("weight_block_size")
    view = dict(tensors)
    for stem in packed_stems(tensors, SCALE):
        parts = {"weight": view.pop(f"{stem}.weight"), SCALE: view.pop(f"{stem}.{SCALE}")}
        view[f"{stem}.weight"] = ScaledTensor(parts, None if block is None else (int(block[0]), int(block[1])))
    for name in [name for name in view if name.endswith(".activation_scale")]:
        del view[name]
    return view
