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
"""What the steps that train a whole model towards its original have in common."""

from dataclasses import dataclass

from hfcompress.distillation.divergences import MIXED, Divergence, Kind
from hfcompress.distillation.objective import Objective
from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe


@dataclass(frozen=True, kw_only=True)
class Training(Recipe):
    """
    Args:
        epochs (`int`, *optional*, defaults to 8): times that the calibration rows are gone through.
        steps (`int`, *optional*): optimizer steps, instead of `epochs`.
        tokens (`int`, *optional*): tokens that are trained on, instead of either; rounded up to whole steps.
        learning_rate (`float`): of what is trained.
        batch_size (`int`, *optional*, defaults to 4): rows per optimizer step.
        accumulation (`int`, *optional*, defaults to 1): parts that a step's rows go through the model in: less memory,
            the same result.
        held_out (`int`, *optional*, defaults to 16): calibration rows that are not trained on.
        loss (`str`, *optional*, defaults to `"forward_kl"`): how far the distributions are from the original's:
            `"forward_kl"`, `"reverse_kl"`, `"jsd"`, `"skew_forward_kl"`, `"skew_reverse_kl"` or `"total_variation"`; see
            [`hfcompress.distillation.divergences.Divergence`]. Which iterate is kept is always decided by the forward KL.
        mix (`float`, *optional*): of the mixture in `"jsd"` (0.5 if left out) and the skew ones (0.1).
        temperature (`float`, *optional*, defaults to 1.0): of both distributions in the loss.
        cross_entropy (`float`, *optional*, defaults to 0): weight of the tokens that really follow, beside that.
        seed (`int`, *optional*, defaults to 0): which rows are held out, and the order of the others.
    """

    epochs: int = 8
    steps: int | None = None
    tokens: int | None = None
    learning_rate: float = 0.01
    batch_size: int = 4
    accumulation: int = 1
    held_out: int = 16
    loss: Kind = "forward_kl"
    mix: float | None = None
    temperature: float = 1.0
    cross_entropy: float = 0.0
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.steps is not None and self.tokens is not None:
            raise InvalidValueError(f"{self.name} has steps and tokens; give one of them.")
        for key in ("epochs", "steps", "tokens", "batch_size", "accumulation", "held_out"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise InvalidValueError(f"{self.name}.{key} is {value}; it must be at least 1.")
        for key in ("learning_rate", "cross_entropy", "seed"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise InvalidValueError(f"{self.name}.{key} is {getattr(self, key)}; it must be 0 or more.")
        if not 0 < self.temperature < float("inf"):
            raise InvalidValueError(f"{self.name}.temperature is {self.temperature}; it must be above 0.")
        if self.mix is not None and self.loss not in MIXED:
            raise InvalidValueError(
                f"{self.name}.mix is for {', '.join(MIXED)}; leave it out with {self.name}.loss={self.loss}."
            )
        if self.mix is not None and not 0 < self.mix < 1:
            raise InvalidValueError(f"{self.name}.mix is {self.mix}; it must lie between 0 and 1.")
        if self.batch_size % self.accumulation:
            raise InvalidValueError(
                f"{self.name}.accumulation ({self.accumulation}) must divide {self.name}.batch_size ({self.batch_size})."
            )

    @property
    def divergence(self) -> Divergence:
        """From the original."""
        return Divergence(self.loss, self.mix, self.temperature)

    @property
    def objective(self) -> Objective:
        """What it is trained for."""
        return Objective(divergence=self.divergence, cross_entropy=self.cross_entropy)
