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
"""Field types checked when a recipe is made, so that a mistake is told before any work starts."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hfcompress.errors import InvalidValueError, nearest


def check_keys(given: Mapping[str, Any], known: list[str], where: str) -> None:
    """
    Raises:
        InvalidValueError: a key that is not known; the nearest known one is named.
    """
    for key in given:
        if key not in known:
            hint = nearest(str(key), known) or f" There are {', '.join(known)}."
            raise InvalidValueError(f"{where} has no key '{key}'.{hint}")


def check_fields(instance: Any, where: str) -> None:
    """
    Check every field of a frozen dataclass against its annotation; lists become tuples, whole numbers floats.

    Raises:
        InvalidValueError: a value of the wrong type, or one that is not among the choices.
    """
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = _checked(getattr(instance, field.name), hints[field.name], f"{where}.{field.name}")
        object.__setattr__(instance, field.name, value)


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        kinds = [h for h in get_args(hint) if h is not type(None)]
        fitting = (h for h in kinds if isinstance(value, get_origin(h) or h) and not isinstance(value, bool))
        hint = kinds[0] if get_origin(kinds[0]) in (Literal, tuple) else next(fitting, kinds[0])
        origin = get_origin(hint)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
            choices = ", ".join(str(c) for c in get_args(hint))
            words = [c for c in get_args(hint) if isinstance(c, str)]
            hint_text = nearest(value, words) if isinstance(value, str) and words else ""
            raise InvalidValueError(f"{where} is {value!r}; it must be one of {choices}.{hint_text}")
        return value
    if origin is tuple:
        kinds = get_args(get_args(hint)[0]) or (str,)
        value = (value,) if isinstance(value, kinds) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, kinds) for v in value):
            what = "names or 're:' patterns" if kinds == (str,) else "numbers or texts"
            raise InvalidValueError(f"{where} is {value!r}; it must be a list of {what}.")
        return tuple(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-2 as a text
        except ValueError:
            pass
    wanted = {Mapping: "a mapping", int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    expected = Mapping if origin is not None else hint
    if not isinstance(value, expected) or (expected in (int, float) and isinstance(value, bool)):
        raise InvalidValueError(f"{where} is {value!r}; it must be {wanted.get(expected, expected.__name__)}.")
    return value
