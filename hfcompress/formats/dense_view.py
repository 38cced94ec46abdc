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
"""A quantized checkpoint as the dense model that it stands for, each weight unpacked when it is asked for."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import UnsupportedModelError
from hfcompress.formats.reading import decoded, is_streamed
from hfcompress.models.checkpoint import Checkpoint, StoredTensor, entry_of


@dataclass(frozen=True)
class Unpacked:
    """
    Reads as a [`hfcompress.models.checkpoint.StoredTensor`] of the dense weight does.

    Args:
        name (`str`): of the weight.
        stored (`Any`): what is stored of it.
        dtype (`torch.dtype`): in which it would be written.
    """

    name: str
    stored: Any
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def nbytes(self) -> int:
        """Of the dense weight."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def path(self) -> None:
        """It lies in no file as it is read."""

    def read(self) -> Tensor:
        """In float32, free of the rounding to the model's dtype."""
        return self.stored.read()

    def entry(self, index: int) -> Tensor:
        """One along the first dimension, in float32."""
        return entry_of(self.stored, index)

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


def dense_view(checkpoint: Checkpoint) -> Checkpoint:
    """
    Args:
        checkpoint (`Checkpoint`): in any format that is read; a dense one is returned as it is.

    Raises:
        UnsupportedModelError: a format that is not read, or one in which inputs are rounded too: without that rounding it
            would be another model.
    """
    config = checkpoint.quantization_config
    if config is None:
        return checkpoint
    method = config.get("quant_method")
    if not is_streamed(config):
        raise UnsupportedModelError(
            f"{checkpoint.name} is already quantized ({method}), and not in a format that can be unpacked; give the original model."
        )
    tensors, dtype = decoded(checkpoint.tensors, config), checkpoint.config.dtype
    if any(getattr(getattr(tensor, "grid", None), "activations", "none") != "none" for tensor in tensors.values()):
        raise UnsupportedModelError(
            f"{checkpoint.name} is already quantized ({method}) and rounds what its linears read, which plain weights would not; "
            "give the original model."
        )
    view = copy.copy(checkpoint)
    view.config = copy.deepcopy(checkpoint.config)
    del view.config.quantization_config
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    dense: dict[str, Any] = dict(tensors)
    for name, tensor in tensors.items():
        if not isinstance(tensor, StoredTensor):
            dense[name] = Unpacked(name, tensor, dtype)
    view.tensors = dense
    view.packed = checkpoint
    return view
