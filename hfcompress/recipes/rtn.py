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
"""Round to nearest: seconds, no calibration data."""

from dataclasses import dataclass
from typing import ClassVar

from hfcompress.recipes.quantization import Quantization


@dataclass(frozen=True, kw_only=True)
class RTN(Quantization):
    """Round every weight to the nearest value of its group's grid. The arguments are those of [`Quantization`]."""

    name: ClassVar[str] = "rtn"

    def quantize(self, weight, statistics, grid, scale_dtype, linears, curvature=None, keep=None):
        """See `passes.plan.Quantizer`."""
        from hfcompress.solvers.rtn import rtn

        importance = None if statistics is None else statistics.gram.diagonal()
        return rtn(weight, grid, scale_dtype, self.scales == "search", importance), {}
