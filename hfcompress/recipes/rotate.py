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
"""Rotate: turn the residual stream and the heads' values, so that weights lose less when they are rounded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from hfcompress.errors import InvalidValueError
from hfcompress.models.names import ALL_LINEARS
from hfcompress.recipes.base import Recipe


@dataclass(frozen=True, kw_only=True)
class Rotate(Recipe):
    """
    Fold Hadamard rotations into the weights before they are quantized (arXiv 2404.00456, 2405.16406): the model stays
    the same function and loads as before, but a few large entries become many of middle size. It carries no grid, so a
    step that quantizes must follow: `Rotate() >> GPTQ(bits=3)`. A model that cannot be rotated exactly is left alone,
    and the reason is told.

    A model whose output head shares its weight with the embeddings gets a head of its own when `hidden` is done, which
    makes it larger by one embedding matrix.

    Args:
        hidden (`bool`, *optional*, defaults to `True`): rotate the residual stream (R1).
        heads (`bool`, *optional*, defaults to `True`): rotate the values of every attention head (R2).
        seed (`int`, *optional*, defaults to 0): of the rotations.
        when (`str`, *optional*, defaults to `"better"`): `"better"` to quantize a few calibration rows both ways and
            keep the rotation if the divergence from the original is smaller with it on held-out rows; `"always"` to
            rotate without asking.
    """

    name: ClassVar[str] = "rotate"

    hidden: bool = True
    heads: bool = True
    seed: int = 0
    when: Literal["better", "always"] = "better"

    def __post_init__(self):
        super().__post_init__()
        if not self.hidden and not self.heads:
            raise InvalidValueError("rotate has both hidden and heads off; turn one on, or leave the step out.")
        if self.seed < 0:
            raise InvalidValueError(f"rotate.seed is {self.seed}; it must be at least 0.")
        if self.targets != (ALL_LINEARS,) or self.ignore or self.overrides:
            raise InvalidValueError("rotate turns the whole model; leave its targets, ignore and overrides out.")


def rotation_of(steps: Sequence[Recipe]) -> Rotate | None:
    """
    The step of a recipe that rotates, if there is one.

    Raises:
        InvalidValueError: there are several, or no step that quantizes comes after it.
    """
    places = [place for place, step in enumerate(steps) if isinstance(step, Rotate)]
    if not places:
        return None
    if len(places) > 1:
        raise InvalidValueError("The recipe has several steps 'rotate'; one is enough, keep the first.")
    [place] = places
    if place > 0 or len(steps) == 1:
        raise InvalidValueError(
            "rotate prepares the weights for the steps after it; write it first, before a step that quantizes such as "
            "gptq."
        )
    step = steps[place]
    assert isinstance(step, Rotate)
    return step
