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
A checkpoint's tensor that is multiplied by gains and rotations when it is read.

Nothing large is held: a tensor is rotated in float64, in pieces, and kept in float32 until it is given out.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfcompress.models.checkpoint import TensorView
from hfcompress.models.residual import Norm
from hfcompress.solvers.rotation import Rotation


PIECE = 1 << 22  # entries that are rotated at once


@dataclass(frozen=True)
class Turn:
    """Slices of a tensor along a dimension, each multiplied by the same rotation."""

    dim: int
    starts: tuple[int, ...]
    rotation: Rotation

    def apply(self, tensor: Tensor) -> None:
        """In place."""
        for start in self.starts:
            part = tensor.narrow(self.dim, start, self.rotation.size).movedim(self.dim, -1)
            part = part[None] if part.ndim == 1 else part
            step = max(1, PIECE // self.rotation.size)
            for first in range(0, len(part), step):
                piece = part[first : first + step]
                piece.copy_(self.rotation.apply(piece))


@dataclass(frozen=True)
class Gain:
    """What a norm multiplied its output by, now taken over along a dimension: `offset + slope * weight`."""

    dim: int
    weight: Any
    norm: Norm

    def values(self) -> Tensor:
        """Float64 `(hidden_size,)`."""
        return self.norm.offset + self.norm.slope * self.weight.read().double()

    def apply(self, tensor: Tensor) -> None:
        """In place."""
        gain = self.values().to(tensor.device)
        tensor.copy_(tensor.double() * gain if self.dim == tensor.ndim - 1 else tensor.double() * gain[:, None])


@dataclass(frozen=True)
class RotatedTensor(TensorView):
    """
    A tensor of a checkpoint that is changed when it is read; see [`hfcompress.models.checkpoint.StoredTensor`].

    Args:
        stored: the original.
        changes (`tuple[Gain | Turn, ...]`): in this order.
        rounded (`bool`, *optional*, defaults to `True`): read it in the original's dtype; otherwise in float32.
    """

    changes: tuple[Gain | Turn, ...]
    rounded: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def read(self) -> Tensor:
        """The changed tensor; a copy."""
        value = self.stored.read()
        value = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
        for change in self.changes:
            change.apply(value)
        return value.to(self.dtype) if self.rounded else value

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


def unrounded(tensors: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """
    The same tensors, with those among `names` that are rotated read in float32: what a solver should start from. The
    others are written as they are read.
    """
    return {
        name: replace(tensor, rounded=False) if name in names and isinstance(tensor, RotatedTensor) else tensor
        for name, tensor in tensors.items()
    }
