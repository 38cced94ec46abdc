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
"""The same values in fewer bytes."""

from dataclasses import dataclass
from typing import ClassVar

from hfcompress.recipes.coded import Coded


@dataclass(frozen=True, kw_only=True)
class Lossless(Coded):
    """
    Store weights without any loss, their exponents entropy-coded; bf16 takes two thirds of its bytes. They are decoded
    while they are loaded. The arguments are those of [`Recipe`].
    """

    name: ClassVar[str] = "lossless"
    type: ClassVar[str] = "plain"
    needs_dense_stream: ClassVar[bool] = False
    needs_curvature: ClassVar[bool] = False

    def quantize(self, *_, **__):
        """What is plain is stored as it is: nothing asks for this (`passes.solving`)."""
        raise AssertionError
