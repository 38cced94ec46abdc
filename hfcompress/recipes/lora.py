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
"""LoRA: a narrow correction beside what was compressed."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.training import Training


@dataclass(frozen=True, kw_only=True)
class LoRA(Training):
    """
    Give back what compression lost by a low-rank adapter, trained on the original's distributions while the compressed
    weights stay: `GPTQ(bits=2) >> LoRA(rank=16)`. The adapter is written as an ordinary PEFT repo in the folder `adapter` of
    the checkpoint, whose weights are not touched; or with `merge` it goes into weights that are not rounded, where their
    zeros remain: `Sparsify() >> LoRA(merge=True)`. Needs the whole model in memory, but no optimizer for it; see
    `passes.lora_pass`. The rows that are held out decide which iterate is kept, so on them the result is never worse than the
    start. Needs the extra `peft`.

    Args:
        rank (`int`, *optional*, defaults to 16): of the corrections.
        init (`str`, *optional*): `"error"`, the product of that rank which is nearest to what the weight has lost, where its
            inputs go (the truncated SVD of `(W - Q) H^(1/2)`, EoRA, arXiv 2410.21271): it helps before any training; or
            `"zero"`, as LoRA begins. The first if left out, with `merge` the second.
        merge (`bool`, *optional*, defaults to `False`): into the weights, by which no adapter is left; only what is not zero
            changes.
        learning_rate (`float`, *optional*, defaults to 3e-4): of AdamW, without weight decay.
        targets (`tuple[str, ...]`, *optional*): which of the compressed linears are corrected; see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].

    The other settings are those of [`Training`].
    """

    name: ClassVar[str] = "lora"
    needs_inputs: ClassVar[bool] = True

    rank: int = 16
    init: Literal["error", "zero"] | None = None
    merge: bool = False
    learning_rate: float = 3e-4

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise InvalidValueError(f"lora.rank is {self.rank}; it must be at least 1.")
        if self.merge and self.init == "error":
            raise InvalidValueError(
                "lora.init=error repairs what was rounded, and lora.merge is for what was not; leave one of the two out."
            )
        if self.overrides:
            raise InvalidValueError(
                "lora takes no overrides: all linears are trained together; use targets or ignore."
            )

    @property
    def begins_at_error(self) -> bool:
        """Whether the corrections begin at what was lost."""
        return not self.merge and self.init != "zero"

    def check_place(self, before, after):
        """It comes last, after a step that quantizes or sparsifies."""
        if not any(hasattr(step, "quantize") or hasattr(step, "sparsify") for step in before):
            raise InvalidValueError("lora corrects a compressed model: put gptq, rtn or sparsify before it.")
        folding = next((step for step in before if hasattr(step, "candidates")), None)
        if folding is not None:
            raise InvalidValueError(
                f"lora compares the weights with the original's, and {folding.name} rescales them first; leave one of the two "
                "out."
            )
        if after:
            raise InvalidValueError(f"lora must be the last step; put {after[0].name} before it.")
