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
"""Text of another domain than prose, from what is installed anyway: the source code of transformers."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


PACKAGE = "transformers"


def source_code() -> Iterator[str]:
    """The package's source files in the order of their paths, one text per file: the same for the same version."""
    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    for path in sorted(Path(spec.origin).parent.glob("*.py")):
        yield path.read_text(encoding="utf-8")
