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
"""Block tuning: all that the steps before have left of a block together, by the error of its output."""

from dataclasses import dataclass
from typing import ClassVar

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe


@dataclass(frozen=True, kw_only=True)
class Tune(Recipe):
    """
    Move what the steps before have left of a block by the gradients of its output's error. Some of the rows are held
    out, and the iterate that is best on them is kept, or the start.

    Codes and scales go by the signs of the gradients: `GPTQ(bits=2) >> Tune()` (SignRound, arXiv 2309.05516, started from
    error feedback instead of rounding to nearest). Behind `Sparsify` or `Prune` with nothing that rounds, the weights
    themselves go by Adam, and zeros remain: `Sparsify("2:4") >> Tune(batch_tokens=1024)`. Right behind `Prune` it is a
    part of its stage.

    Args:
        iterations (`int`, *optional*, defaults to 100): steps for each block.
        learning_rate (`float`, *optional*, defaults to 0.01): of the weights, in steps of their grids, or where
            there is none in units of the typical weight of each row; it falls to zero.
        scale_learning_rate (`float`, *optional*, defaults to 0.002): of the scales, as a fraction of each.
        batch_tokens (`int`, *optional*, defaults to 4096): tokens for each step, in whole rows.
        halves (`bool`, *optional*, defaults to `False`): first the attention, by its own output, then the rest of the
            block by the block's (arXiv 2510.14444), instead of all of it together; `iterations` steps for each.
        seed (`int`, *optional*, defaults to 0): the order of the rows.
        targets (`tuple[str, ...]`, *optional*): which of the changed linears move; see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
    """

    name: ClassVar[str] = "tune"
    needs_inputs: ClassVar[bool] = True

    iterations: int = 100
    learning_rate: float = 0.01
    scale_learning_rate: float = 0.002
    batch_tokens: int = 4096
    halves: bool = False
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for key in ("iterations", "batch_tokens"):
            if getattr(self, key) < 1:
                raise InvalidValueError(f"tune.{key} is {getattr(self, key)}; it must be at least 1.")
        for key in ("learning_rate", "scale_learning_rate", "seed"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise InvalidValueError(f"tune.{key} is {getattr(self, key)}; it must be 0 or more.")
        if self.overrides:
            raise InvalidValueError(
                "tune takes no overrides: the linears of a block are tuned together; use targets or ignore."
            )
