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
"""What all steps share: which linears they are for, how they chain, how they are written down."""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from hfcompress.errors import InvalidValueError
from hfcompress.models.names import ALL_LINEARS, matches
from hfcompress.recipes.validation import check_fields, check_keys


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    One step of a compression.

    Args:
        targets (`tuple[str, ...]`, *optional*, defaults to `("Linear",)`): the linears that the step is for: `"Linear"`
            (all in the decoder blocks), full names or their last parts (`"q_proj"`), or `re:` patterns that match a
            full name from its beginning.
        ignore (`tuple[str, ...]`, *optional*): linears that are left alone, in the same terms.
        overrides (`Mapping[str, Mapping]`, *optional*): name or pattern -> the keys that differ for those linears;
            the first that matches counts.
    """

    name: ClassVar[str]
    needs_inputs: ClassVar[bool] = False

    targets: tuple[str, ...] = (ALL_LINEARS,)
    ignore: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        check_fields(self, self.name)
        for pattern, changes in self.overrides.items():
            if not isinstance(pattern, str):
                raise InvalidValueError(f"{self.name}.overrides: {pattern!r} is no name and no 're:' pattern.")
            if not isinstance(changes, Mapping):
                raise InvalidValueError(f"{self.name}.overrides[{pattern}] must be a mapping of keys to values.")
            self._changed(changes)
        for pattern in (*self.targets, *self.ignore, *self.overrides):
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise InvalidValueError(f"{self.name}: '{pattern}' is no regular expression: {error}.") from error

    def __rshift__(self, other: "Recipe | Steps") -> "Steps":
        return Steps((self,)) >> other

    def _changed(self, changes: Mapping[str, Any]) -> Self:
        own = {f.name for f in dataclasses.fields(Recipe)}
        check_keys(changes, [f.name for f in dataclasses.fields(self) if f.name not in own], f"{self.name}.overrides")
        return dataclasses.replace(self, **{"overrides": {}, **changes})

    def check_place(self, before: "Sequence[Recipe]", after: "Sequence[Recipe]") -> None:
        """
        Whether the step can stand between the steps `before` it and `after` it.

        Raises:
            InvalidValueError: it cannot.
        """

    def for_linear(self, linear: str) -> Self | None:
        """The settings for a linear, or `None` if the step leaves it alone."""
        if not matches(linear, self.targets) or matches(linear, self.ignore):
            return None
        for pattern, changes in self.overrides.items():
            if matches(linear, (pattern,)):
                return self._changed(changes)
        return self

    def for_cache(self) -> Self | None:
        """The settings for the key-value cache, or `None` if the step leaves it alone."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The keys that differ from their defaults, as plain YAML and JSON values."""
        values = {}
        for f in dataclasses.fields(self):
            default = f.default if f.default is not dataclasses.MISSING else {}
            value = getattr(self, f.name)
            if value != default:
                values[f.name] = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
        return values


@dataclass(frozen=True)
class Steps:
    """Steps one after the other, sharing one pass over the model and one set of statistics."""

    steps: tuple[Recipe, ...]

    def __rshift__(self, other: "Recipe | Steps") -> "Steps":
        if not isinstance(other, (Recipe, Steps)):
            return NotImplemented
        return Steps(self.steps + (other.steps if isinstance(other, Steps) else (other,)))
