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
"""A weight that is solved, read as the model will compute with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.passes.plan import LinearTask


@dataclass(frozen=True)
class SolvedWeight:
    """
    Held packed, dense only when it is read; see [`hfcompress.models.checkpoint.StoredTensor`].

    Args:
        task (`LinearTask`): what was done.
        tensors (`Mapping[str, Tensor]`): what was made of it, by names on disk.
        layout: the format that they are in.
    """

    task: LinearTask
    tensors: Mapping[str, Tensor]
    layout: Any

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return self.task.scale_dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight."""
        return self.task.shape.out_features, self.task.shape.in_features

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self) -> Tensor:
        """The dense weight in float32."""
        layout = self.layout.of(self.task.grid)
        return layout.restore(self.tensors, self.task.stem, self.task.grid, self.task.shape.transposed)

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]
