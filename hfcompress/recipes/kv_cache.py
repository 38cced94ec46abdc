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
"""The step `kv_cache`: keys and values kept in 8 bits, or in vectors."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from hfcompress.errors import InvalidValueError
from hfcompress.models.names import ALL_LINEARS
from hfcompress.recipes.base import Recipe
from hfcompress.recipes.quantization import Observer


@dataclass(frozen=True, kw_only=True)
class KVCache(Recipe):
    """
    Keep the keys and values of every attention in 8 bits, by one scale each from calibration, or in vectors that are learned
    from it. It goes beside a step that changes the weights.

    Args:
        type (`str`, *optional*, defaults to `"float"`): `"float"` for E4M3, which vLLM serves, `"int"`, or `"vector"`: a byte
            for every `8 / bits` channels, in a [`hfcompress.runtime.vector_cache.VectorCache`] that the user hands to the
            model. The vectors lie beside the weights, which they do not change.
        bits (`int`, *optional*): per channel: 8, or 1, 2 (the default) or 4 in vectors.
        observer (`str`, *optional*, defaults to `"mse"`): how the range is chosen; see [`Quantization`].
    """

    name: ClassVar[str] = "kv_cache"

    type: Literal["int", "float", "vector"] = "float"
    bits: Literal[1, 2, 4, 8] | None = None
    observer: Observer = "mse"

    def __post_init__(self):
        super().__post_init__()
        if self.targets != (ALL_LINEARS,) or self.ignore or self.overrides:
            raise InvalidValueError(
                "kv_cache is for the cache of every attention, as checkpoints have one scheme for it; leave out targets, "
                "ignore and overrides."
            )
        if self.bits is not None and (self.type == "vector") == (self.bits == 8):
            raise InvalidValueError(
                f"kv_cache.bits is {self.bits}; with type: vector it is 1, 2 or 4, and 8 with the other types."
            )

    def check_place(self, before, after):
        """It changes no weights, and a checkpoint is written by steps that do."""
        if not before and not after:
            raise InvalidValueError(
                "kv_cache needs a step beside it: one that rounds weights, such as rtn or gptq, or with type: vector also "
                "lossless, which leaves them as they are."
            )

    def for_linear(self, linear: str) -> None:
        """It leaves the linears alone."""
        return

    def for_cache(self) -> Self | None:
        """Its settings, if the model itself is to round."""
        return None if self.type == "vector" else self

    @property
    def vector_bits(self) -> int | None:
        """Bits of a channel where they are vectors."""
        return (self.bits or 2) if self.type == "vector" else None
