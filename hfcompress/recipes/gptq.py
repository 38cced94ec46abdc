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
"""GPTQ: rounding with error feedback, on calibration data."""

from dataclasses import dataclass
from typing import ClassVar

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.quantization import Quantization


@dataclass(frozen=True, kw_only=True)
class GPTQ(Quantization):
    """
    Round the columns of a weight one after the other and let the later ones make up for the error of the earlier
    (arXiv 2210.17323). The further arguments are those of [`Quantization`].

    Args:
        act_order (`bool`, *optional*, defaults to `True`): round the most excited columns first. Groups and scales
            stay where they are, so nothing changes for whoever loads the result.
        damping (`float`, *optional*, defaults to 0.01): added to the diagonal of the Gram matrix, as a share of its
            mean.
        shift (`float`, *optional*, defaults to 0.0): how much each linear may make up for what was lost before it: the
            largest share of that correction, from 0 to 1; what is taken is settled on held-out rows. It takes the dense
            model's stream beside the calibration's.
        curvature (`bool`, *optional*, defaults to `False`): feed errors back along the rows too, by what each output is
            worth to the predictions. It takes one backward pass through the model.
        refine (`int`, *optional*, defaults to 0): rounds in which scales and codes are improved in turn.
    """

    name: ClassVar[str] = "gptq"
    needs_inputs: ClassVar[bool] = True

    act_order: bool = True
    damping: float = 0.01
    shift: float = 0.0
    curvature: bool = False
    refine: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.damping <= 1:
            raise InvalidValueError(f"gptq.damping is {self.damping}; it must lie between 0 and 1.")
        if not 0 <= self.shift <= 1:
            raise InvalidValueError(f"gptq.shift is {self.shift}; it must lie between 0 and 1.")
        if self.refine < 0:
            raise InvalidValueError(f"gptq.refine is {self.refine}; it must not be negative.")
        if self.type == "float" and (self.curvature or self.refine):
            raise InvalidValueError(
                "gptq.curvature and gptq.refine are for integer codes: leave them out beside type float."
            )

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's stream is carried beside the calibration's."""
        return self.shift > 0

    @property
    def needs_curvature(self) -> bool:
        """Whether the outputs' worth to the predictions is asked for."""
        return self.curvature

    def quantize(self, weight, statistics, grid, scale_dtype, linears, curvature=None, keep=None):
        """See `passes.plan.Quantizer`."""
        from hfcompress.solvers.curvature import factorize_rows, indifferent
        from hfcompress.solvers.gptq import gptq
        from hfcompress.solvers.grid import QuantizedWeight
        from hfcompress.solvers.two_sided import gptq_two_sided

        factor = statistics.factor(self.damping, self.act_order, linears)
        target, share = statistics.target(weight, self.damping, self.act_order, linears, self.shift)
        search = self.scales == "search"
        plain = curvature is None and not self.refine and keep is None

        def solve(part: slice, blocks: slice):
            if plain:
                found = gptq(weight[part], factor, grid, scale_dtype, search, target[part])
            else:
                own = weight[part]
                rows = indifferent(len(own)) if curvature is None else factorize_rows(curvature[blocks])
                stays = None if keep is None else keep[part]
                found = gptq_two_sided(
                    own, target[part], statistics.gram, factor, rows, grid, scale_dtype, search, self.refine, stays
                )
            return found.codes, found.scales, found.zero_points

        blocks = None if curvature is None else [len(block) for block in curvature]
        quantized = QuantizedWeight(*statistics.in_parts(solve, len(weight), blocks), grid)
        raised = factor.damping > self.damping
        details = {
            "damping": factor.damping,
            "dead_columns": factor.dead,
            "fallback": f"damping raised to {factor.damping:g}" if raised else None,
        }
        return quantized, {**details, "shift": share} if self.shift else details
