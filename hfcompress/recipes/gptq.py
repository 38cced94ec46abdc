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
    """

    name: ClassVar[str] = "gptq"
    needs_inputs: ClassVar[bool] = True

    act_order: bool = True
    damping: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.damping <= 1:
            raise InvalidValueError(f"gptq.damping is {self.damping}; it must lie between 0 and 1.")

    def quantize(self, weight, statistics, grid, scale_dtype, linears):
        """See `passes.plan.Quantizer`."""
        from hfcompress.solvers.gptq import gptq

        factor = statistics.factor(self.damping, self.act_order, linears)
        quantized = gptq(weight, factor, grid, scale_dtype, self.scales == "search")
        raised = factor.damping > self.damping
        return quantized, {
            "damping": factor.damping,
            "dead_columns": factor.dead,
            "fallback": f"damping raised to {factor.damping:g}" if raised else None,
        }
