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
"""A step that another library does whole: transformers quantizes with it while it loads the model."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from hfcompress.errors import InvalidValueError, MissingExtraError
from hfcompress.recipes.base import Recipe


@dataclass(frozen=True, kw_only=True)
class LibraryStep(Recipe):
    """
    No calibration data is needed, and no other step can stand beside it. It writes the library's own format.

    Args:
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
    """

    package: ClassVar[str]
    extra: ClassVar[str]

    def __post_init__(self):
        super().__post_init__()
        if self.overrides:
            raise InvalidValueError(f"{self.name} takes no overrides: {self.package} treats all linears alike.")

    def check_place(self, before, after):
        """It is the only step."""
        others = [*before, *after]
        if others:
            raise InvalidValueError(
                f"{self.name} quantizes the whole model by itself; take {others[0].name} out of the recipe."
            )

    def require(self) -> None:
        """
        Raises:
            MissingExtraError: the library is not installed.
        """
        if find_spec(self.package) is None:
            raise MissingExtraError(f"{self.name} needs {self.package}: pip install 'hfcompress[{self.extra}]'.")

    def quantization_config(self, skipped: list[str], dtype: Any) -> Any:
        """What `from_pretrained` takes; `skipped` are names of linears, `dtype` is the model's."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """`bits`, `group_size` and `symmetric` of every linear, for the manifest."""
        raise NotImplementedError
