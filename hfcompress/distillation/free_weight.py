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
"""A linear whose weight is not rounded and learns, but for its zeros."""

import torch
from torch import Tensor, nn

from hfcompress.solvers.grid import QuantizedWeight


class FreeWeight(nn.Module):
    """
    A parametrization of a weight (`torch.nn.utils.parametrize`): what is trained are the weights in units of what is
    typical in their row, so that a learning rate means the same for every row of every linear.

    Args:
        start (`QuantizedWeight`): where it starts, on a plain grid.
        dtype (`torch.dtype`): of the arithmetic.
        sparse (`bool`): what is zero remains so.
        transposed (`bool`, *optional*, defaults to `False`): the linear holds its weight `(in_features, out_features)`.
    """

    def __init__(self, start: QuantizedWeight, dtype: torch.dtype, sparse: bool, transposed: bool = False):
        super().__init__()
        self.start, self.dtype, self.transposed = start, dtype, transposed
        values = start.dequantize()
        kept = values != 0
        typical = (values.square().sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)).sqrt()
        self.unit: Tensor
        self.keep: Tensor | None
        self.register_buffer("unit", torch.where(typical > 0, typical, 1.0))
        self.register_buffer("keep", kept if sparse else None)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Where training starts from: `(out_features, in_features)` float32."""
        return self._turned(weight).float() / self.unit

    def forward(self, position: Tensor) -> Tensor:
        return self._turned(self._values(position)).to(self.dtype)

    @torch.no_grad()
    def quantized(self, position: Tensor) -> QuantizedWeight:
        """What would be stored now."""
        codes = self._values(position).to(self.start.codes.dtype)
        return QuantizedWeight(codes, self.start.scales, None, self.start.grid)

    def _values(self, position: Tensor) -> Tensor:
        weight = position * self.unit
        return weight if self.keep is None else weight * self.keep

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight
