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
"""AWQ: channels that matter are scaled up before their weights are rounded."""

from dataclasses import dataclass
from typing import ClassVar

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe


@dataclass(frozen=True, kw_only=True)
class AWQ(Recipe):
    """
    Move a factor per input channel out of what produces a linear's input and into its weight, so that the rounding
    which follows costs less (arXiv 2306.00978). The result is an ordinary checkpoint of the same shape: only the gains
    of norms and the weights change. A step that rounds must follow; the linears that it leaves alone are not touched.

    Args:
        grid (`int`, *optional*, defaults to 20): how many strengths are tried, besides leaving everything as it is; the
            best few by the error of the linears' output are compared closely.
        rows (`int`, *optional*, defaults to 8): calibration rows on which the block's output is then compared, for
            linears whose own output does not tell (queries, keys, values, gate and up).
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`]; here the linears whose inputs are scaled.
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
        overrides (`Mapping[str, Mapping]`, *optional*): see [`Recipe`]; of linears that read the same tensor, the
            first one's count.
    """

    name: ClassVar[str] = "awq"
    needs_inputs: ClassVar[bool] = True
    rounds_inputs: ClassVar[bool] = False

    grid: int = 20
    rows: int = 8

    def __post_init__(self):
        super().__post_init__()
        for key in ("grid", "rows"):
            if getattr(self, key) < 1:
                raise InvalidValueError(f"awq.{key} is {getattr(self, key)}; it must be at least 1.")

    def candidates(self, magnitudes):
        """See `passes.plan.Smoother`."""
        from hfcompress.solvers.smoothing import awq_candidates

        return awq_candidates(magnitudes, self.grid)
