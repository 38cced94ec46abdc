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
"""A linear whose weight is rounded to its grid at every use and learns nevertheless."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfcompress.models.roles import Linear, linear_shape
from hfcompress.solvers.fake_quantization import MARGIN, fake_quantize, positions, round_to_codes
from hfcompress.solvers.grid import QuantizedWeight


LEAST, MOST = 0.1, 10.0  # times its start: how far a scale may go


class FakeQuantized(nn.Module):
    """
    A parametrization of a weight (`torch.nn.utils.parametrize`): what is trained are each weight's position on the
    grid, in steps, and each scale's ratio to its start. So a learning rate means the same for every linear of every
    model: steps of the grid for a weight, a fraction of itself for a scale.

    The scales in use are always rounded to the dtype that they are stored in, and the codes belong to those scales, so
    there is nothing left to round when the training ends.

    Args:
        start (`QuantizedWeight`): where it starts, exactly.
        dtype (`torch.dtype`): of the arithmetic.
        codes_fixed (`bool`, *optional*, defaults to `False`): the codes stay, and the whole change of a scale reaches
            its weights (as in EfficientQAT's end-to-end phase, arXiv 2407.11062). LSQ's gradient would not do here: it
            reckons with weights that stay where they are and change their codes when the scale moves.
        keep (`Tensor`, *optional*): bool like the weight: the others are zero, and remain so.
        transposed (`bool`, *optional*, defaults to `False`): the linear holds its weight `(in_features, out_features)`.
    """

    def __init__(
        self,
        start: QuantizedWeight,
        dtype: torch.dtype,
        codes_fixed: bool = False,
        keep: Tensor | None = None,
        transposed: bool = False,
    ):
        super().__init__()
        self.transposed = transposed
        self.keep: Tensor | None
        self.register_buffer("keep", keep)
        self.start, self.grid, self.dtype, self.codes_fixed = start, start.grid, dtype, codes_fixed
        self.start_scales: Tensor
        self.register_buffer("start_scales", start.scales.float())
        self.ratio = nn.Parameter(torch.ones_like(self.start_scales))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Where training starts from: the dense weight's positions within the cells of the codes, or the codes."""
        weight = weight.T if self.transposed else weight
        return positions(weight, self.start, 0.5 if self.codes_fixed else MARGIN)

    def scales(self) -> Tensor:
        """The scales in use: float32 `(out_features, groups)`; the gradient passes their rounding."""
        exact = self.start_scales * self.ratio.clamp(LEAST, MOST)
        stored = exact.detach().to(self.start.scales.dtype).float()
        stored = torch.where(stored == 0, self.start_scales, stored)  # an underflow
        return straight_through(exact, stored)

    def learned(self) -> list[nn.Parameter]:
        """What is trained at the learning rate of scales."""
        return [self.ratio]

    def forward(self, position: Tensor) -> Tensor:
        scales, position = self.scales(), self._kept(position)
        if self.codes_fixed:
            weight = (position.view(*scales.shape, -1) * scales.unsqueeze(-1)).view_as(position)
        else:
            weight = fake_quantize(position, self.start_scales, scales, self.start.zero_points, self.grid)
        return (weight.T if self.transposed else weight).to(self.dtype)

    @torch.no_grad()
    def quantized(self, position: Tensor) -> QuantizedWeight:
        """What would be stored now."""
        scales = self.scales()
        codes = self.start.codes
        if not self.codes_fixed:
            codes = round_to_codes(self._kept(position), self.start_scales, scales, self.start.zero_points, self.grid)
        stored = scales.to(self.start.scales.dtype)
        return QuantizedWeight(codes.to(torch.int8), stored, self.start.zero_points, self.grid)

    def _kept(self, position: Tensor) -> Tensor:
        return position if self.keep is None else position * self.keep


class _StraightThrough(torch.autograd.Function):
    """Another value, the gradient as it is."""

    @staticmethod
    def forward(ctx, exact, rounded):
        return rounded

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded`, with the gradient going to `exact` as it is."""
    return _StraightThrough.apply(exact, rounded)


def fake_quantize_linear(
    linear: Linear, start: QuantizedWeight, dtype: torch.dtype, train: str, sparse: bool = False
) -> FakeQuantized:
    """
    Let a linear that still holds its dense weight train on a grid.

    Args:
        linear (`nn.Linear` or `Conv1D`): what is to be trained.
        start (`QuantizedWeight`): its rounded weight.
        dtype (`torch.dtype`): of the arithmetic.
        train (`str`): `"weights"`, `"scales"` or `"both"`.
        sparse (`bool`, *optional*, defaults to `False`): what is zero remains so.
    """
    keep = start.dequantize() != 0 if sparse else None
    added = FakeQuantized(start, dtype, train == "scales", keep, linear_shape("", linear).transposed)
    parametrize.register_parametrization(linear, "weight", added, unsafe=True)
    linear.get_parameter("parametrizations.weight.original").requires_grad_(train != "scales")
    added.ratio.requires_grad_(train != "weights")
    return added
