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
"""bitsandbytes: 4-bit NormalFloat, or LLM.int8()."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.library_step import LibraryStep


BLOCK = 64  # bitsandbytes' own, for 4 bits


@dataclass(frozen=True, kw_only=True)
class BitsAndBytes(LibraryStep):
    """
    Args:
        type (`str`, *optional*, defaults to `"nf4"`): `"nf4"`, 16 levels at the quantiles of a normal distribution and
            a scale for every 64 weights (QLoRA, arXiv 2305.14314), or `"int8"`, one scale per row and inputs that are
            rounded to 8 bits at run time except where they are large (LLM.int8(), arXiv 2208.07339).
        double_quant (`bool`, *optional*, defaults to `False`): of nf4, round the scales to 8 bits too.
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
    """

    name: ClassVar[str] = "bitsandbytes"
    package: ClassVar[str] = "bitsandbytes"
    extra: ClassVar[str] = "bnb"

    type: Literal["nf4", "int8"] = "nf4"
    double_quant: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.double_quant and self.type != "nf4":
            raise InvalidValueError("bitsandbytes.double_quant is for type nf4; leave it out.")

    def quantization_config(self, skipped, dtype):
        """See [`LibraryStep`]."""
        from transformers import BitsAndBytesConfig

        if self.type == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )

    def described(self):
        """See [`LibraryStep`]."""
        if self.type == "int8":
            return {"bits": 8, "group_size": -1, "symmetric": True}
        return {"bits": 4, "group_size": BLOCK, "symmetric": True}
