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
"""torchao: 8-bit weights."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hfcompress.recipes.library_step import LibraryStep


@dataclass(frozen=True, kw_only=True)
class TorchAo(LibraryStep):
    """
    Args:
        type (`str`, *optional*, defaults to `"int8"`): `"int8"`, weights rounded to 8 bits with one scale per row.
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
    """

    name: ClassVar[str] = "torchao"
    package: ClassVar[str] = "torchao"
    extra: ClassVar[str] = "torchao"

    type: Literal["int8"] = "int8"

    def quantization_config(self, skipped, dtype):
        """See [`LibraryStep`]."""
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)

    def described(self):
        """See [`LibraryStep`]."""
        return {"bits": 8, "group_size": -1, "symmetric": True}
