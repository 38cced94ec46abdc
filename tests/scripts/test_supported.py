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
"""README's table of what works with what is what is found when it is tried."""

from pathlib import Path

import pytest
import supported


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
TABLE = README.partition(supported.BEGIN)[2].partition(supported.END)[0].splitlines(keepends=True)


def test_the_table_has_a_row_for_every_architecture():
    assert TABLE[0] == supported.line(["", *supported.COLUMNS])
    assert [row.split("|")[1].strip() for row in TABLE[2:]] == list(supported.ARCHITECTURES)


@pytest.mark.parametrize("architecture", supported.ARCHITECTURES)
def test_what_is_told_of_it_is_true(architecture, tmp_path):
    assert supported.line([architecture, *supported.row(architecture, tmp_path)]) in TABLE, "run scripts/supported.py"
