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
"""The table on stdout."""

import sys
from collections.abc import Callable, Sequence
from typing import Any


PLAIN_WIDTH = 150  # where there is no terminal
LEFT = ("method", "recipe", "setting", "against", "remark")


def show(columns: dict[str, Callable[[Any], str]], rows: Sequence[Any], title: str) -> None:
    """
    Args:
        columns (`dict[str, Callable]`): heading -> cell of a row.
        rows (`Sequence`): with `setting`, and `remark` for what else there is to say.
        title (`str`): above the table.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    remarks = any(row.remark for row in rows)
    for column in (*columns, *(["remark"] if remarks else [])):
        justify = "left" if column in LEFT else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column in columns)
    for index, row in enumerate(rows):
        cells = [*(cell(row) for cell in columns.values()), *([row.remark] if remarks else [])]
        last = index + 1 == len(rows) or rows[index + 1].setting != row.setting
        table.add_row(*map(Text, cells), end_section=last)
    terminal = sys.stdout.isatty()
    Console(no_color=not terminal, highlight=False, width=None if terminal else PLAIN_WIDTH).print(table)


def number(value: float | None, form: str) -> str:
    """A cell."""
    return "-" if value is None else format(value, form)
