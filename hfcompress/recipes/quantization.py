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

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe


Observer = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True, kw_only=True)
class Quantization(Recipe):
    """
    Args:
        bits (`int`, *optional*, defaults to 4): bits per weight: 2, 3, 4 or 8.
        group_size (`int`, *optional*, defaults to 128): weights of a row that share a scale: 32, 64 or 128, or -1 for
            the whole row.
        symmetric (`bool`, *optional*, defaults to `True`): no zero point; all levels are used, scales may be negative.
        type (`str`, *optional*, defaults to `"int"`): `"int"`, or `"float"` for E4M3 weights (8 bits, a scale per row).
        activations (`str`, *optional*, defaults to `"none"`): how a linear's inputs are rounded when it runs, to 8 bits
            of the same type: `"none"`, `"dynamic"` (a scale per token, found on the fly) or `"static"` (one scale, from
            calibration). Both need 8-bit symmetric weights with a scale per row.
        observer (`str`, *optional*, defaults to `"mse"`): the range of static activations: `"mse"` gives the least
            squared error, `"percentile"` clips one value in ten thousand, `"minmax"` none.
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
    type: Literal["int", "float"] = "int"
    activations: Literal["none", "dynamic", "static"] = "none"
    observer: Observer = "mse"
    scales: Literal["search", "minmax"] = "search"
    on_indivisible: Literal["error", "channel", "skip"] = "error"

    def __post_init__(self):
        super().__post_init__()
        fitting = self.bits == 8 and self.group_size == -1 and self.symmetric
        if self.type == "float" and not fitting:
            raise InvalidValueError(
                f"{self.name}.type float is E4M3 with a scale per row: set {self.name}.bits to 8, group_size to -1, and "
                "symmetric to true."
            )
        if self.activations != "none" and not fitting:
            raise InvalidValueError(
                f"{self.name}.activations {self.activations} needs weights of 8 bits with a scale per row: set "
                f"{self.name}.bits to 8, group_size to -1, and symmetric to true."
            )
        if self.activations != "static" and self.observer != Quantization.observer:
            raise InvalidValueError(
                f"{self.name}.observer is for static activations: set {self.name}.activations to static, or leave "
                "observer out."
            )

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's stream is carried beside the calibration's."""
        return False

    @property
    def needs_curvature(self) -> bool:
        """Whether it is asked what the outputs are worth to the predictions."""
        return False
