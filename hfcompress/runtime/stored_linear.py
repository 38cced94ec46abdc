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
"""A linear whose weight stays in memory as it is stored, and is unpacked for as long as it runs."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from hfcompress.errors import InvalidValueError
from hfcompress.formats.layout import Layout
from hfcompress.formats.native.streams import FREQUENCIES
from hfcompress.formats.stored import PackedTensor
from hfcompress.solvers.grid import Grid


STORED = "stored_"  # in the names of buffers


class PackedLinear(nn.Module, ABC):
    """
    The base of what takes the place of an `nn.Linear` without a dense weight. Its state holds the tensors as they lie on disk, so
    that `save_pretrained` writes them again.

    Args:
        shape (`tuple[int, int]`): `(out_features, in_features)`.
        grid (`Grid`): of the weight.
        layout (`Layout`): the format.
        bias (`nn.Parameter`, *optional*): of the linear.
    """

    def __init__(self, shape: tuple[int, ...], grid: Grid, layout: Layout, bias: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features = shape
        self.grid, self.layout = grid, layout
        self.bias = bias
        self.savable = True  # with all others of its model

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The tensors on disk, by local names."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not self.savable:
            raise InvalidValueError(
                "Some weights of this model are packed, and others are not as the checkpoint holds them: nothing was saved; copy the "
                "folder, or load it with packed=False to save plain weights."
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.stored().items():
            destination[f"{prefix}{name}"] = tensor

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid.type}"


class StoredLinear(PackedLinear):
    """
    The same outputs as with the unpacked weight, for the memory of the stored one and, while it runs, of one weight more.

    Args:
        stored (`PackedTensor`): the weight, from any format that hfcompress reads.
        bias (`nn.Parameter`, *optional*): of the linear.
        device (`torch.device`): where the stored tensors are kept, as is what they are unpacked to.
    """

    def __init__(self, stored: PackedTensor, bias: nn.Parameter | None, device: torch.device):
        super().__init__(stored.shape, stored.grid, stored.layout, bias)
        self.parts = tuple(stored.parts)
        for name, tensor in stored.tensors().items():
            self.register_buffer(f"{STORED}{name}", tensor.to(device), persistent=False)

    def stored(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"{STORED}{name}") for name in self.parts}

    @property
    def weight(self) -> Tensor:
        """Unpacked now: float32 `(out_features, in_features)`."""
        parts = self.stored()
        if FREQUENCIES in parts:  # entropy-coded, which is undone on the CPU
            parts = {name: part.cpu() for name, part in parts.items()}
        return self.layout.unpack(parts, self.grid).dequantize()

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight.to(inputs.device, inputs.dtype)
        return nn.functional.linear(inputs, weight, self.bias)
