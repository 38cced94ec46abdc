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
"""A linear whose weight is a product of two factors, or that and another block's weight, and which learns the factors."""

import torch
from torch import Tensor, nn

from hfcompress.distillation.fake_quantized import straight_through
from hfcompress.solvers.grid import QuantizedWeight


class LearnedFactors(nn.Module):
    """
    A parametrization of a weight (`torch.nn.utils.parametrize`). What is trained is how far each entry of both factors has gone
    from its start, in root mean squares of its column of the first, or row of the second. What is in use is rounded to the
    dtype that it is stored in; the weight that is leant on stays.

    Args:
        start (`QuantizedWeight`): where it starts, exactly.
        dtype (`torch.dtype`): of the arithmetic.
    """

    def __init__(self, start: QuantizedWeight, dtype: torch.dtype):
        super().__init__()
        self.start, self.dtype = start, dtype
        self.left = nn.Parameter(torch.zeros(start.codes.shape, device=start.codes.device))
        self.right = nn.Parameter(torch.zeros(start.scales.shape, device=start.scales.device))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Nothing of the dense weight is needed."""
        return weight.new_zeros(0)

    def learned(self) -> list[nn.Parameter]:
        """What is trained at the learning rate of scales."""
        return [self.left, self.right]

    def _in_use(self) -> tuple[Tensor, Tensor]:
        """Both factors as they are stored, in float32; the gradient passes their rounding."""
        found = []
        for begun, offset, dim in ((self.start.codes, self.left, 0), (self.start.scales, self.right, 1)):
            unit = begun.float().square().mean(dim, keepdim=True).sqrt()
            exact = begun.float() + unit * offset
            found.append(straight_through(exact, exact.detach().to(begun.dtype).float()))
        return found[0], found[1]

    def forward(self, _: Tensor) -> Tensor:
        left, right = self._in_use()
        weight = left @ right
        return (weight if self.start.base is None else self.start.base + weight).to(self.dtype)

    @torch.no_grad()
    def quantized(self, _: Tensor) -> QuantizedWeight:
        """What would be stored now."""
        left, right = (part.to(self.start.codes.dtype) for part in self._in_use())
        return QuantizedWeight(left, right, None, self.start.grid, base=self.start.base)
