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
"""SmoothQuant: outliers of the inputs move into the weights."""

from dataclasses import dataclass
from typing import ClassVar

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe


@dataclass(frozen=True, kw_only=True)
class Smooth(Recipe):
    """
    Move a factor per input channel out of what produces a linear's input and into its weight, so that both can be
    rounded to 8 bits (arXiv 2211.10438). Meant to stand before a step that rounds weights and inputs. A pair that is
    forecast to lose by it is left alone.

    Args:
        strength (`float`, *optional*, defaults to 0.5): how much of the inputs' unevenness the weights take over, 0 to
            1.
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`]; here the linears whose inputs are scaled.
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
        overrides (`Mapping[str, Mapping]`, *optional*): see [`Recipe`]; of linears that read the same tensor, the
            first one's count.
    """

    name: ClassVar[str] = "smooth"
    needs_inputs: ClassVar[bool] = True
    rounds_inputs: ClassVar[bool] = True
    rows: ClassVar[int] = 0

    strength: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise InvalidValueError(f"smooth.strength is {self.strength}; it must lie between 0 and 1.")

    def candidates(self, magnitudes):
        """See `passes.plan.Smoother`."""
        from hfcompress.solvers.smoothing import smoothquant_scales

        return [(self.strength, smoothquant_scales(magnitudes, self.strength))]
