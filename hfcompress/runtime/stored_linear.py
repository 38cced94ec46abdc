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

import torch
from torch import Tensor, nn

from hfcompress.formats.native.streams import FREQUENCIES
from hfcompress.formats.stored import PackedTensor


STORED = "stored_"  # in the names of buffers


class StoredLinear(nn.Module):
    """
    Takes the place of an `nn.Linear`: the same outputs as with the unpacked weight, for the memory of the stored one and, while
    it runs, of one weight more. It is for running a model, not for training it or saving it.

    Args:
        stored (`PackedTensor`): the weight, from any format that hfcompress reads.
        bias (`nn.Parameter`, *optional*): of the linear.
        device (`torch.device`): where the stored tensors are kept, as is what they are unpacked to.
    """

    def __init__(self, stored: PackedTensor, bias: nn.Parameter | None, device: torch.device):
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.grid, self.layout = stored.grid, stored.layout
        self.bias = bias
        self.parts = tuple(stored.parts)
        for name, tensor in stored.tensors().items():
            self.register_buffer(f"{STORED}{name}", tensor.to(device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Unpacked now: float32 `(out_features, in_features)`."""
        parts = {name: self.get_buffer(f"{STORED}{name}") for name in self.parts}
        if FREQUENCIES in parts:  # entropy-coded, which is undone on the CPU
            parts = {name: part.cpu() for name, part in parts.items()}
        return self.layout.unpack(parts, self.grid).dequantize()

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight.to(inputs.device, inputs.dtype)
        return nn.functional.linear(inputs, weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid.type}"
