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
"""Weights in as many bits as they are worth: a grid whose codes are entropy-coded."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.coded import Coded


MOST = 6  # bits, beyond which codes of one byte are too few


@dataclass(frozen=True, kw_only=True)
class Entropy(Coded):
    """
    GPTQ whose codes are not clipped and take as many bits as they are worth, any rate on average. It is for storage and
    download: the weights are decoded while they are loaded.

    Args:
        bits (`float`, *optional*, defaults to 2.5): bits per weight in the file, everything counted: above 0, up to 6.
        damping (`float`, *optional*, defaults to 0.03): added to the diagonal of the Gram matrix, as a share of its
            mean.
        shift (`float`, *optional*, defaults to 1.0): how much each linear may make up for what was lost before it, as in
            [`GPTQ`].
        curvature (`bool`, *optional*, defaults to `True`): weigh the outputs by what they are worth to the predictions, as
            in [`GPTQ`].
        allocation (`str`, *optional*, defaults to `"global"`): `"global"` gives more bits to linears whose errors cost
            more, `bits` on average; it needs `curvature`. `"uniform"` gives the same to all.
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
        overrides (`Mapping[str, Mapping]`, *optional*): see [`Recipe`].
    """

    name: ClassVar[str] = "entropy"
    needs_inputs: ClassVar[bool] = True
    looks_up: ClassVar[bool] = True
    type: ClassVar[str] = "coded"

    bits: float = 2.5
    damping: float = 0.03
    shift: float = 1.0
    curvature: bool = True
    allocation: Literal["global", "uniform"] = "global"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.bits <= MOST:
            raise InvalidValueError(
                f"entropy.bits is {self.bits:g}; it must lie above 0 and not above {MOST}. For more there are "
                "8-bit grids, and the step lossless."
            )
        if self.allocation == "global" and not self.curvature:
            object.__setattr__(self, "allocation", "uniform")  # without it linears do not compare
        self._check_shares("damping", "shift")

    @property
    def needs_curvature(self) -> bool:
        """Whether the outputs' worth to the predictions is asked for."""
        return self.curvature

    def quantize(self, weight, statistics, grid, scale_dtype, linears, curvature=None, keep=None):
        """See `passes.plan.Quantizer`."""
        from hfcompress.solvers.coded import gptq_coded, sweep_coded
        from hfcompress.solvers.curvature import factorize_rows, indifferent

        factor = statistics.factor(self.damping, True, linears)
        target, share = statistics.target(weight, self.damping, True, linears, self.shift)
        rows = indifferent(len(weight)) if curvature is None else factorize_rows(curvature)
        blocks = None if curvature is None else [len(block) for block in curvature]

        def sweep(scales, columns):
            def solve(part: slice, own: slice):
                these = rows
                if part != slice(0, len(weight)):
                    length = part.stop - part.start
                    these = indifferent(length) if curvature is None else factorize_rows(curvature[own])
                stays = None if keep is None else keep[part]
                return (sweep_coded(target[part], factor, these, scales[part], columns, grid, stays),)

            return statistics.in_parts(solve, len(weight), blocks)[0]

        found = gptq_coded(target, factor, rows, grid, sweep)
        details = self._reported(factor, share)
        if not found.codes.any():
            details["fallback"] = (
                f"every weight is rounded to zero: {grid.bits_on_average:.2g} bits are not enough for it"
            )
        return found, details
