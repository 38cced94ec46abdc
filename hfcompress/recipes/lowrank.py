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
"""Weights that become the product of two thin factors."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.coded import Coded, refuse_zeros


@dataclass(frozen=True, kw_only=True)
class LowRank(Coded):
    """
    Every weight becomes the product of two factors, the best of its rank for the outputs. At equal bytes rounding keeps far
    more: this is for what rounding cannot give, and for comparison.

    Args:
        ratio (`float`, *optional*, defaults to 0.8): the share of parameters that the factors hold together: above 0,
            below 1.
        damping (`float`, *optional*, defaults to 0.03): added to the diagonal of the Gram matrix, as a share of its
            mean.
        shift (`float`, *optional*, defaults to 1.0): how much each linear may make up for what was lost before it, as in
            [`GPTQ`].
        curvature (`bool`, *optional*, defaults to `True`): weigh the outputs by what they are worth to the predictions, as
            in [`GPTQ`].
        allocation (`str`, *optional*, defaults to `"global"`): `"global"` gives higher ranks to linears that lose more,
            `ratio` in all, and leaves those whole that are worth it; it needs `curvature`. `"uniform"` gives all the same
            share.
        multiple (`int`, *optional*, defaults to 8): what ranks are multiples of.
        shrinkage (`float`, *optional*, defaults to 0.0): singular values are made smaller by this share of the largest that
            is left out, up to 1, which is that of the nuclear norm.
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
        overrides (`Mapping[str, Mapping]`, *optional*): see [`Recipe`].
    """

    name: ClassVar[str] = "lowrank"
    needs_inputs: ClassVar[bool] = True
    type: ClassVar[str] = "factors"
    trainable: ClassVar[bool] = True
    alone: ClassVar[bool] = True

    ratio: float = 0.8
    damping: float = 0.03
    shift: float = 1.0
    curvature: bool = True
    allocation: Literal["global", "uniform"] = "global"
    multiple: int = 8
    shrinkage: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise InvalidValueError(f"lowrank.ratio is {self.ratio:g}; it must lie above 0 and below 1.")
        if self.multiple < 1:
            raise InvalidValueError(f"lowrank.multiple is {self.multiple}; it must be at least 1.")
        if self.allocation == "global" and not self.curvature:
            object.__setattr__(self, "allocation", "uniform")  # without it linears do not compare
        self._check_shares("damping", "shift", "shrinkage")

    def check_place(self, before, after):
        """No product keeps zeros."""
        super().check_place(before, after)
        refuse_zeros(self.name, before)

    @property
    def needs_curvature(self) -> bool:
        """Whether the outputs' worth to the predictions is asked for."""
        return self.curvature

    def rank(self, out_features: int, in_features: int) -> int | None:
        """The rank of a linear where all hold the same share; `None` if it is too small to be factored."""
        from hfcompress.solvers.lowrank import rank_at, worth_factoring

        found = rank_at(self.ratio, (out_features, in_features), self.multiple)
        return found if worth_factoring(found, (out_features, in_features)) else None

    def quantize(self, weight, statistics, grid, scale_dtype, linears, curvature=None, keep=None):
        """See `passes.plan.Quantizer`."""
        from hfcompress.solvers.grid import QuantizedWeight
        from hfcompress.solvers.lowrank import spectrum

        factor = statistics.factor(self.damping, False, linears)
        target, share = statistics.target(weight, self.damping, False, linears, self.shift)
        found = spectrum(target, factor.damped(statistics.gram), curvature)
        left, right = (part.to(scale_dtype) for part in found.truncated(grid.rank, self.shrinkage))
        details = self._reported(factor, share)
        return QuantizedWeight(left, right, None, grid), {"rank": grid.rank, **details}
