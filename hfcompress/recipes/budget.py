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
"""Bits and group sizes chosen unit by unit, so that the whole fits a budget at the least loss."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args, get_type_hints

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe
from hfcompress.recipes.quantization import Quantization
from hfcompress.sizes import parse_size


CHOICES = ("2g32", "2g64", "3g64", "3g128", "4g64", "4g128", "8g128")
TARGETS = ("target_size", "target_bits", "target_kl")
DEFAULT_BITS = 3.25
BITS, GROUP_SIZES = (get_args(get_type_hints(Quantization)[key]) for key in ("bits", "group_size"))


@dataclass(frozen=True, kw_only=True)
class Budget(Recipe):
    """
    Choose the bits and the group size of every linear of the quantizing step that follows. Linears that serving engines
    fuse (queries, keys and values; gate and up) share a choice. What a choice costs is the error that the step itself
    leaves, weighed by the gradients of the model's predictions. Give one target at most.

    Args:
        target_size (`int` or `str`, *optional*): bytes of `model*.safetensors`, all that they hold included; `3.5GB`
            is 3.5e9.
        target_bits (`float`, *optional*, 3.25 if there is no target): bits per weight: 8 times the bytes of all tensors of the linears that the
            step compresses (codes, scales, shapes), over the number of their weights.
        target_kl (`float`, *optional*): mean KL to the original in nats, on calibration rows that are held out; the
            smallest result that is expected to keep it.
        choices (`tuple[str, ...]`, *optional*): bits and group size, such as `"4g128"`; a group size of -1 is one scale
            per row. A choice whose group size does not divide a linear's width is none for its unit.
        head (`bool`, *optional*, defaults to `True`): an output head with a weight of its own is open to choice too,
            whether or not the step that follows names it.
        targets (`tuple[str, ...]`, *optional*): the linears that are open to choice, see [`Recipe`]; the others keep
            the settings of the step that follows, and so do those for which its own `overrides` say bits or group size.
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
        overrides (`Mapping[str, Mapping]`, *optional*): name or pattern -> `choices` of its own.
    """

    name: ClassVar[str] = "budget"
    needs_inputs: ClassVar[bool] = True

    target_size: int | str | None = None
    target_bits: float | None = None
    target_kl: float | None = None
    choices: tuple[str, ...] = CHOICES
    head: bool = True

    def __post_init__(self):
        if isinstance(self.target_size, str):
            object.__setattr__(self, "target_size", parse_size(self.target_size))
        if isinstance(self.choices, (list, tuple)):
            object.__setattr__(self, "choices", tuple(map(str, self.choices)))  # YAML may have read a number
        super().__post_init__()
        given = [key for key in TARGETS if getattr(self, key) is not None]
        if len(given) > 1:
            raise InvalidValueError(f"budget has {' and '.join(given)}; give one of {', '.join(TARGETS)}.")
        if not 0 < self.target[1] < math.inf:
            raise InvalidValueError(f"budget.{given[0]} is {getattr(self, given[0])}; it must be a number above 0.")
        if not self.choices:
            raise InvalidValueError(f"budget.choices is empty; give some, such as {', '.join(CHOICES)}.")
        for choice in self.choices:
            parse_choice(choice)
        for pattern, changes in self.overrides.items():
            if set(changes) != {"choices"}:
                raise InvalidValueError(f"budget.overrides[{pattern}] can set choices and nothing else.")

    @property
    def target(self) -> tuple[str, float]:
        """Which target is given, and its value."""
        key = next((key for key in TARGETS if getattr(self, key) is not None), None)
        return ("target_bits", DEFAULT_BITS) if key is None else (key, getattr(self, key))


def parse_choice(choice: str) -> tuple[int, int]:
    """
    Bits and group size of a choice: of `"4g128"` 4 and 128.

    Raises:
        InvalidValueError: it is no choice, or one that the quantizing steps do not have.
    """
    found = re.fullmatch(r"(\d+)g(-?\d+)", choice)
    if found is None:
        raise InvalidValueError(f"budget.choices: '{choice}' is none; write bits and group size like 4g128.")
    bits, group_size = int(found[1]), int(found[2])
    for word, value, known in (("bits", bits, BITS), ("group size", group_size, GROUP_SIZES)):
        if value not in known:
            listed = ", ".join(map(str, known))
            raise InvalidValueError(f"budget.choices: '{choice}' has the {word} {value}; there are {listed}.")
    return bits, group_size


def find_budget(steps: Sequence[Recipe]) -> tuple[Budget, Quantization] | None:
    """
    The budget of a recipe and the step that it is for, the one right behind it; `None` where there is no budget.

    Raises:
        InvalidValueError: several budgets, or one without a quantizing step behind it.
    """
    places = [index for index, step in enumerate(steps) if isinstance(step, Budget)]
    if not places:
        return None
    if len(places) > 1:
        raise InvalidValueError("A recipe can have one budget, and this one has several.")
    budget, behind = steps[places[0]], steps[places[0] + 1 : places[0] + 2]
    if not behind or not isinstance(behind[0], Quantization):
        raise InvalidValueError(
            "budget chooses the bits of the step behind it, so put a quantizing step there, such as `- gptq: {}`."
        )
    assert isinstance(budget, Budget)
    return budget, behind[0]
