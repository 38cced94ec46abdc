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
Reading checkpoints of MXFP4 experts, as gpt-oss is published (Open Compute Project, Microscaling Formats, MX v1.0).

Of a parameter `(experts, columns, rows)`, `<name>_blocks` uint8 `(experts, rows, columns / 32, 16)` holds E2M1 numbers, two in a
byte, the first in its low half; `<name>_scales` uint8 `(experts, rows, columns / 32)` the exponents, plus 127, of the power of two
that 32 of them are multiplied by.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.models.checkpoint import entry_of


QUANT_METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BIAS, NAN = 127, 255  # of exponents


@dataclass(frozen=True)
class MxTensor:
    """
    Reads as the dense parameter.

    Args:
        blocks: the numbers, as they are stored.
        scales: the exponents, as they are stored.
    """

    blocks: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        *experts, rows, groups, half = self.blocks.shape
        return *experts, 2 * groups * half, rows

    @property
    def dtype(self) -> torch.dtype:
        """Which holds every value."""
        return torch.bfloat16

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.blocks.nbytes + self.scales.nbytes

    def read(self) -> Tensor:
        """
        The values, float32.

        Raises:
            CheckpointError: a value is no number.
        """
        return self._values(self.blocks.read(), self.scales.read())

    def entry(self, index: int) -> Tensor:
        """Those of one expert, float32 `(columns, rows)`."""
        return self._values(entry_of(self.blocks, index), entry_of(self.scales, index))

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]

    def _values(self, blocks: Tensor, scales: Tensor) -> Tensor:
        if (scales == NAN).any():
            raise CheckpointError(f"{self.scales.name} holds NaN; download or copy its file again.")
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
        values = torch.where(codes < 8, E2M1[codes & 7], -E2M1[codes & 7])
        return torch.ldexp(values, scales.int()[..., None] - BIAS).flatten(-2).transpose(-1, -2)


def decoded(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """
    A view of such a checkpoint's tensors in which compressed weights appear dense.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`Mapping`): the `quantization_config`.

    Raises:
        CheckpointError: there are more or fewer scales than blocks.
    """
    view = dict(tensors)
    for name in [name.removesuffix(BLOCKS) for name in tensors if name.endswith(BLOCKS)]:
        blocks, scales = view.pop(name + BLOCKS), view.pop(name + SCALES)
        if tuple(scales.shape) != tuple(blocks.shape[:-1]):
            raise CheckpointError(
                f"{name}{SCALES} is {tuple(scales.shape)}, and there are {tuple(blocks.shape[:-1])} blocks; download or copy its "
                "file again."
            )
        view[name] = MxTensor(blocks, scales)
    return view
