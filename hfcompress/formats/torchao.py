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
"""torchao checkpoints, read through the library's own tensor classes."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hfcompress.errors import CheckpointError, MissingExtraError


QUANT_METHOD = "torchao"
MARK = "._weight_"  # before the name of a part


@dataclass(frozen=True)
class DecodedTensor:
    """
    A compressed weight that reads as the dense one it stands for.

    Args:
        name (`str`): its name in the model.
        parts (`dict`): name on disk -> stored tensor.
        description (`str`): what the shard says of it.
        shape (`tuple[int, int]`): of the dense weight.
    """

    name: str
    parts: dict[str, Any]
    description: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight."""
        return torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts.values())

    def read(self) -> Tensor:
        """The dense weight in float32."""
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        tensors = {name: part.read() for name, part in self.parts.items()}
        metadata = {"tensor_names": f'["{self.name}"]', self.name: self.description}
        found, _ = unflatten_tensor_state_dict(tensors, metadata)
        return found[self.name].dequantize().float()

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


def decoded(tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """
    A view of a checkpoint's tensors in which compressed weights appear dense under their original names.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`dict`): the `quantization_config`.

    Raises:
        MissingExtraError: torchao is not installed.
        CheckpointError: a shard does not say what its tensors are.
    """
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "Reading a torchao checkpoint needs torchao: pip install 'hfcompress[torchao]'."
        ) from error
    metadata = functools.cache(_metadata)
    view = dict(tensors)
    for stem in dict.fromkeys(name.partition(MARK)[0] for name in tensors if MARK in name):
        parts = {name: view.pop(name) for name in tensors if name.startswith(stem + MARK)}
        weight, first = f"{stem}.weight", next(iter(parts.values()))
        description = metadata(first.path).get(weight)
        if description is None:
            raise CheckpointError(f"{first.path} does not say what {weight} is; download or copy that file again.")
        view[weight] = DecodedTensor(weight, parts, description, tuple(parts[f"{stem}{MARK}qdata"].shape))
    return view


def _metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as shard:
        return shard.metadata() or {}
