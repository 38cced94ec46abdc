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
"""Blocks that lean on others: their weights are those of another block and a small difference."""

from dataclasses import dataclass
from typing import ClassVar

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.coded import Coded, refuse_zeros


@dataclass(frozen=True, kw_only=True)
class Share(Coded):
    """
    Some blocks use the weights of another one, and a difference of low rank of their own; which, is told by what it would
    cost on calibration data. All others stay as they are, stored without loss. `Share() >> QAT()` trains the differences on
    the original's predictions.

    Args:
        blocks (`float`, *optional*, defaults to 0.25): the share of the blocks that lean on another: above 0, up to 0.5.
        rank (`int`, *optional*, defaults to 16): of the differences.
        reach (`int`, *optional*, defaults to 2): how many blocks away the other one is at most.
        damping (`float`, *optional*, defaults to 0.03): added to the diagonal of the Gram matrix, as a share of its
            mean.
        shift (`float`, *optional*, defaults to 1.0): how much each linear may make up for what was lost before it, as in
            [`GPTQ`].
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
    """

    name: ClassVar[str] = "share"
    needs_inputs: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = True
    type: ClassVar[str] = "plain"
    alone: ClassVar[bool] = True
    trainable: ClassVar[bool] = True

    blocks: float = 0.25
    rank: int = 16
    reach: int = 2
    damping: float = 0.03
    shift: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.blocks <= 0.5:
            raise InvalidValueError(f"share.blocks is {self.blocks:g}; it must lie above 0 and not above 0.5.")
        for key in ("rank", "reach"):
            if getattr(self, key) < 1:
                raise InvalidValueError(f"share.{key} is {getattr(self, key)}; it must be at least 1.")
        self._check_shares("damping", "shift")
        if self.overrides:
            raise InvalidValueError(
                "share takes no overrides: a block leans on another as a whole; use targets or ignore."
            )

    def check_place(self, before, after):
        """What is shared keeps no zeros of its own."""
        super().check_place(before, after)
        refuse_zeros(self.name, before)

    def count(self, total: int) -> int:
        """
        How many of all blocks lean on another.

        Raises:
            InvalidValueError: there is no other.
        """
        if total < 2:
            raise InvalidValueError("share needs a model of at least two blocks; leave the step out.")
        return min(max(1, round(self.blocks * total)), total // 2)

    def quantize(self, weight, statistics, grid, scale_dtype, linears, curvature=None, keep=None, base=None):
        """See `passes.plan.Quantizer`; `base` is the weight that is shared."""
        from hfcompress.solvers.grid import QuantizedWeight
        from hfcompress.solvers.lowrank import spectrum

        factor = statistics.factor(self.damping, False, linears)
        target, share = statistics.target(weight, self.damping, False, linears, self.shift)
        found = spectrum(target - base, factor.damped(statistics.gram), curvature)
        left, right = (part.to(scale_dtype) for part in found.truncated(grid.rank))
        details = self._reported(factor, share)
        return QuantizedWeight(left, right, None, grid, base=base), {"rank": grid.rank, "base": grid.base, **details}
