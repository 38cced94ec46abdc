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
"""What the steps that round weights to a grid have in common."""

from dataclasses import dataclass
from typing import Literal

from hfcompress.recipes.base import Recipe


@dataclass(frozen=True, kw_only=True)
class Quantization(Recipe):
    """
    Args:
        bits (`int`, *optional*, defaults to 4): bits per weight: 2, 3, 4 or 8.
        group_size (`int`, *optional*, defaults to 128): weights of a row that share a scale: 32, 64 or 128, or -1 for
            the whole row.
        symmetric (`bool`, *optional*, defaults to `True`): no zero point; all levels are used, scales may be negative.
        scales (`str`, *optional*, defaults to `"search"`): `"search"` for the scales of least error, `"minmax"` for
            those that clip nothing.
        on_indivisible (`str`, *optional*, defaults to `"error"`): what happens to a linear whose width the group size
            does not divide: `"error"`, `"channel"` (one scale per row), or `"skip"` (left as it is).
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
        overrides (`Mapping[str, Mapping]`, *optional*): see [`Recipe`].
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = 128
    symmetric: bool = True
    scales: Literal["search", "minmax"] = "search"
    on_indivisible: Literal["error", "channel", "skip"] = "error"
