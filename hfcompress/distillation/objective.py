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
"""What a student is trained for: a weighted sum, whose weights and temperature may change on the way."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from hfcompress.distillation.divergences import Divergence


FeatureLoss = Literal["mse", "cosine", "relation", "contrastive", "adversarial"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """
    Args:
        divergence (`Divergence`, *optional*): from the teacher's distribution; the forward KL if left out.
        divergence_weight (`float`, *optional*, defaults to 1): of it.
        cross_entropy (`float`, *optional*, defaults to 0): weight of the tokens that really follow.
        features (`float`, *optional*, defaults to 0): weight of the hidden states.
        feature_loss (`str`, *optional*, defaults to `"mse"`): see [`hfcompress.distillation.features.Features`].
        balanced (`bool`, *optional*, defaults to `False`): measure the hidden states' part in units of the others: its
            weight is multiplied by the ratio of their running means.
        final_temperature (`float`, *optional*): what the temperature of the divergence goes to in a straight line.
    """

    divergence: Divergence = Divergence()  # noqa: RUF009 (it is frozen)
    divergence_weight: float = 1.0
    cross_entropy: float = 0.0
    features: float = 0.0
    feature_loss: FeatureLoss = "mse"
    balanced: bool = False
    final_temperature: float | None = None

    @classmethod
    def of(cls, settings: Any) -> "Objective":
        """What a [`hfcompress.Distill`] or a [`hfcompress.DistillationConfig`] asks for."""
        return cls(
            divergence=Divergence(settings.loss, settings.mix, settings.temperature),
            divergence_weight=settings.loss_weight,
            cross_entropy=settings.cross_entropy,
            features=settings.features,
            feature_loss=settings.feature_loss,
            balanced=settings.balanced,
            final_temperature=settings.final_temperature,
        )

    def divergence_at(self, done: float) -> Divergence:
        """The divergence when a share `done`, from 0 to 1, of the training is over."""
        if self.final_temperature is None:
            return self.divergence
        first = self.divergence.temperature
        return dataclasses.replace(self.divergence, temperature=first + (self.final_temperature - first) * done)


class Balance:
    """The ratio of two parts' running means, of whole optimizer steps; 1 until there are some."""

    decay = 0.9

    def __init__(self):
        self.means: tuple[float, float] | None = None
        self.sums, self.step = [0.0, 0.0], 0

    def add(self, step: int, main: float, other: float) -> None:
        """A part of a step; the one before is whole when the next one begins."""
        if step != self.step:
            self._close()
            self.step = step
        self.sums[0] += main
        self.sums[1] += other

    def _close(self) -> None:
        main, other = self.sums
        self.sums = [0.0, 0.0]
        if self.means is not None:
            main, other = (
                self.decay * a + (1 - self.decay) * b for a, b in zip(self.means, (main, other), strict=True)
            )
        self.means = main, other

    @property
    def ratio(self) -> float:
        """What the other part is multiplied by to be as large as the main one."""
        if self.means is None or self.means[1] <= 0:
            return 1.0
        return self.means[0] / self.means[1]
