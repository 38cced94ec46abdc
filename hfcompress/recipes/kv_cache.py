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
"""The step `kv_cache`: keys and values kept in 8 bits."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from hfcompress.errors import InvalidValueError
from hfcompress.models.names import ALL_LINEARS
from hfcompress.recipes.base import Recipe
from hfcompress.recipes.quantization import Observer


@dataclass(frozen=True, kw_only=True)
class KVCache(Recipe):
    """
    Keep the keys and values of every attention in 8 bits, by one scale each from calibration. It goes beside a step
    that quantizes the weights.

    Args:
        type (`str`, *optional*, defaults to `"float"`): `"float"` for E4M3, which vLLM serves, or `"int"`.
        observer (`str`, *optional*, defaults to `"mse"`): how the range is chosen; see [`Quantization`].
    """

    name: ClassVar[str] = "kv_cache"

    type: Literal["int", "float"] = "float"
    observer: Observer = "mse"

    def __post_init__(self):
        super().__post_init__()
        if self.targets != (ALL_LINEARS,) or self.ignore or self.overrides:
            raise InvalidValueError(
                "kv_cache is for the cache of every attention, as checkpoints have one scheme for it; leave out targets, "
                "ignore and overrides."
            )

    def for_linear(self, linear: str) -> None:
        """It leaves the linears alone."""
        return

    def for_cache(self) -> Self:
        """Its settings."""
        return self
