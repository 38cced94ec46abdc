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
"""Quantization-aware training, from where another step has rounded to."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.training import Training


@dataclass(frozen=True, kw_only=True)
class QAT(Training):
    """
    Train the codes and scales that the steps before it have found, or levels, vectors and factors, so that the model gives the dense model's
    distributions (no labels needed): `GPTQ(bits=3) >> QAT()`. Needs the whole model in memory, with
    gradients and optimizer; see `passes.qat_pass`. The rows that are held out decide which iterate is kept, so on them
    the result is never worse than the start.

    Args:
        learning_rate (`float`, *optional*, defaults to 0.01): of the weights, in steps of their grids.
        scale_learning_rate (`float`, *optional*, defaults to 0.003): of the scales, as a fraction of each.
        train (`str`, *optional*, defaults to `"scales"`): `"scales"` (the codes stay; helps from the first steps on),
            `"weights"`, or `"both"` (at first worse than the start: worth hundreds of steps at 2 bits).
        targets (`tuple[str, ...]`, *optional*): which of the quantized linears are trained; see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].

    The other settings are those of [`Training`].
    """

    name: ClassVar[str] = "qat"
    needs_inputs: ClassVar[bool] = True

    scale_learning_rate: float = 0.003
    train: Literal["scales", "weights", "both"] = "scales"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.scale_learning_rate < float("inf"):
            raise InvalidValueError(f"qat.scale_learning_rate is {self.scale_learning_rate}; it must be 0 or more.")
        if self.overrides:
            raise InvalidValueError("qat takes no overrides: all linears are trained together; use targets or ignore.")

    def check_place(self, before, after):
        """It comes last, after a step that quantizes."""
        if not any(hasattr(step, "quantize") for step in before):
            raise InvalidValueError("qat starts from a quantized model: put gptq or rtn before it.")
        folding = next((step for step in before if hasattr(step, "candidates")), None)
        if folding is not None:
            raise InvalidValueError(
                f"qat starts from the weights as they are stored, and {folding.name} rescales them first; leave one of the "
                "two out."
            )
        if after:
            raise InvalidValueError(f"qat must be the last step; put {after[0].name} before it.")
