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
"""Distill: what pruning or sparsity has left, trained to talk like the original."""

from dataclasses import dataclass
from typing import ClassVar

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe
from hfcompress.recipes.training import Training


MAKERS = ("prune", "sparsify")  # of students
NO_STUDENT = "distill trains what is left of a model: put prune or sparsify right before it, such as prune >> distill."


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """
    Train all weights of the model that the steps before have left, so that it gives the distributions of the original:
    `Prune(depth=0.3) >> Distill() >> GPTQ()`, a run of its own between them. Zeros that a pattern asked for remain. Needs
    the whole student in memory, with gradients and optimizer; the original is streamed. The rows that are held out decide
    which iterate is kept, or the start.

    Args:
        epochs (`int`, *optional*, defaults to 4): times that the calibration rows are gone through.
        learning_rate (`float`, *optional*, defaults to 3e-4): of AdamW, without weight decay; a tenth of the steps warms
            up, and it falls by a cosine.
        held_out (`int`, *optional*, defaults to 8): calibration rows that are not trained on.

    The other settings are those of [`Training`].
    """

    name: ClassVar[str] = "distill"
    needs_inputs: ClassVar[bool] = True

    epochs: int = 4
    learning_rate: float = 3e-4
    held_out: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.overrides or self.ignore or self.targets != Recipe.targets:
            raise InvalidValueError("distill takes no targets, ignore or overrides: the whole model is trained.")

    def check_place(self, before, after):
        """
        Raises:
            InvalidValueError: the student is rounded already, or nothing that makes one stands before it.
        """
        rounding = next((step for step in before if hasattr(step, "quantize")), None)
        if rounding is not None:
            raise InvalidValueError(
                f"distill trains weights that are not rounded yet: put it before {rounding.name}, or take qat."
            )
        if before and before[-1].name not in (*MAKERS, "tune"):  # alone it is a stage
            raise InvalidValueError(NO_STUDENT)
