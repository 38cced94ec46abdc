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
"""A linear whose weights are numbers of levels, or of vectors, and which learns what these are."""

import torch
from torch import Tensor, nn

from hfcompress.distillation.fake_quantized import straight_through
from hfcompress.solvers.grid import QuantizedWeight, at_levels, at_vectors


FARTHEST = 2.0  # root mean squares of its table: how far an entry may go


class LearnedCodebook(nn.Module):
    """
    A parametrization of a weight (`torch.nn.utils.parametrize`) whose codes stay. What is trained is how far each level of a
    row, or each vector of the weight, has gone from its start, in root mean squares of its table, so that a learning rate
    means the same everywhere. All weights with the same code pull at what it stands for (Deep Compression, arXiv
    1510.00149, section 3.2). What is in use is rounded to the dtype that it is stored in.

    Args:
        start (`QuantizedWeight`): where it starts, exactly.
        dtype (`torch.dtype`): of the arithmetic.
        sparse (`bool`, *optional*, defaults to `False`): what is zero remains so.
    """

    def __init__(self, start: QuantizedWeight, dtype: torch.dtype, sparse: bool = False):
        super().__init__()
        self.start, self.dtype = start, dtype
        self.table: Tensor
        self.unit: Tensor
        self.register_buffer("table", (start.scales if start.vectors is None else start.vectors).float())
        each_row = start.vectors is None
        unit = self.table.square().mean(-1, keepdim=True) if each_row else self.table.square().mean()
        unit = unit.sqrt()
        self.register_buffer("unit", unit * (self.table != 0) if sparse else unit.expand_as(self.table))
        self.offset = nn.Parameter(torch.zeros_like(self.table))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Nothing of the dense weight is needed."""
        return weight.new_zeros(0)

    def learned(self) -> list[nn.Parameter]:
        """What is trained at the learning rate of scales."""
        return [self.offset]

    def _in_use(self) -> Tensor:
        """The levels or vectors as they are stored, in float32; the gradient passes their rounding."""
        exact = self.table + self.unit * self.offset.clamp(-FARTHEST, FARTHEST)
        limit = torch.finfo(self._stored.dtype).max
        return straight_through(exact, exact.detach().clamp(-limit, limit).to(self._stored.dtype).float())

    @property
    def _stored(self) -> Tensor:
        return self.start.scales if self.start.vectors is None else self.start.vectors

    def forward(self, _: Tensor) -> Tensor:
        table = self._in_use()
        if self.start.vectors is None:
            weight = at_levels(table, self.start.codes)
        else:
            weight = at_vectors(table, self.start.codes) * self.start.scales.float()
        return weight.to(self.dtype)

    @torch.no_grad()
    def quantized(self, _: Tensor) -> QuantizedWeight:
        """What would be stored now."""
        table, start = self._in_use().to(self._stored.dtype), self.start
        if start.vectors is None:
            return QuantizedWeight(start.codes, table, None, start.grid)
        return QuantizedWeight(start.codes, start.scales, None, start.grid, vectors=table)
