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
"""What the steps that store weights in the library's own format have in common."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe


BESIDE = (
    "sparsify",
    "rotate",
    "prune",
    "distill",
    "entropy",
    "codebook",
    "vq",
    "lowrank",
    "share",
    "lossless",
    "lora",
)


def refuse_zeros(name, before) -> None:
    """
    Raises:
        InvalidValueError: a step before the one called `name` leaves zeros, which it cannot keep.
    """
    if any(step.name == "sparsify" for step in before):
        raise InvalidValueError(f"{name} does not keep zeros; leave out sparsify, or take entropy instead.")


@dataclass(frozen=True, kw_only=True)
class Coded(Recipe):
    """The base of such steps. The arguments are those of [`Recipe`]."""

    alone: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    activations: ClassVar[str] = "none"
    observer: ClassVar[str] = "mse"
    scales: ClassVar[str] = "none"
    on_indivisible: ClassVar[str] = "error"
    looks_up: ClassVar[bool] = False  # also what token ids look up, which has no inputs
    trainable: ClassVar[bool] = False  # by qat, its codes staying what they are

    @property
    def group_size(self) -> int:
        """Weights of a row that belong together; -1 for all."""
        return -1

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's stream is carried beside the calibration's."""
        return getattr(self, "shift", 0) > 0

    def _check_shares(self, *keys: str) -> None:
        """
        Raises:
            InvalidValueError: one of these settings does not lie between 0 and 1.
        """
        for key in keys:
            if not 0 <= getattr(self, key) <= 1:
                raise InvalidValueError(f"{self.name}.{key} is {getattr(self, key)}; it must lie between 0 and 1.")

    def _reported(self, factor, share: float) -> dict[str, Any]:
        """What there is to report of a linear that was solved with a factor and this share of the shift."""
        fallback = f"damping raised to {factor.damping:g}" if factor.damping > getattr(self, "damping", 0) else None
        return {"damping": factor.damping, "dead_columns": factor.dead, "shift": share, "fallback": fallback}

    def check_place(self, before, after):
        """Nothing stands beside it that works on a fixed grid."""
        for step in (*before, *after):
            trains = step.name == "qat" and self.trainable
            if step.name not in BESIDE and not trains and not getattr(step, "vector_bits", None):
                raise InvalidValueError(
                    f"{self.name} can stand beside {', '.join(n for n in BESIDE if n != self.name)}, and not beside "
                    f"{step.name}; leave one of the two out."
                )
