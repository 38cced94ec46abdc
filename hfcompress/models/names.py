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
"""Names of linears: how a user points at them (`Linear`, a name, its last part, a pattern), and what they tell."""

import re


ALL_LINEARS = "Linear"
NUMBER = "[0-9]+"
EXPERTS = "re:.*[.]experts[.][0-9]+[.].*"


def matches(linear: str, patterns: tuple[str, ...]) -> bool:
    """
    Whether a linear's full name is meant by one of the patterns: `"Linear"` means all, `"re:..."` a regular expression
    that matches from the beginning, anything else the full name or its last parts.
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], linear):
                return True
        elif pattern == ALL_LINEARS or linear == pattern or linear.endswith(f".{pattern}"):
            return True
    return False


def in_block(name: str, number: int) -> str:
    """The name of the same in another block: the first number in it is another one."""
    parts = name.split(".")
    place = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join([*parts[:place], str(number), *parts[place + 1 :]])


def block_list(name: str) -> str | None:
    """The module name of the list that a block's linear is in (`model.layers`), or `None` outside of every list."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[:number])


def pattern_of_experts(name: str) -> str | None:
    """A pattern for the linears of all experts, by their names as modules and on disk; `None` where `name` is none of them."""
    return EXPERTS if matches(name, (EXPERTS,)) else None


def means(name: str, stem: str) -> bool:
    """
    Whether a linear called `name` is called `stem` on disk: without the model's prefix, or with what lies around the blocks or
    around experts called otherwise.
    """
    if name == stem or name.endswith(f".{stem}"):
        return True
    block = [re.match(rf"(?:.*?[.])?([^.]+[.]{NUMBER}[.].*)", each) for each in (name, stem)]
    if all(block) and len({found.group(1) for found in block if found}) == 1:
        return True
    own, other = (re.match(rf"(?:.*?[.])?({NUMBER})[.].*[.]experts[.]({NUMBER}[.].*)", each) for each in (name, stem))
    return own is not None and other is not None and own.groups() == other.groups()
