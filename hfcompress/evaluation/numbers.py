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
"""Numbers as a person reads them, on the page, in the card, in the pictures, and in a terminal."""

import math
from typing import Any


NOTHING = "—"  # where there is no value


def number(value: Any, digits: int = 4) -> str:
    """`12,345`, `13.89`, `0.004242`, `3.1e-07`; `—` for no value."""
    if not is_number(value):
        return NOTHING
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{value:,.0f}"
    if value and not 1e-5 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: of 9.9996 it is 1
    return f"{value:,.{max(0, digits - 1 - exponent) if value else 0}f}"


def plus_minus(value: Any, error: Any = None, scale: float = 1.0) -> str:
    """`0.00424 ± 0.00013`: the standard error to two digits, and the value to as many decimals."""
    if not is_number(value) or not is_number(error) or error <= 0:
        return number(value * scale if is_number(value) and scale != 1 else value)
    value, error = value * scale, error * scale
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 8:
        return f"{value:.2e} ± {error:.1e}"
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def percent(value: Any, digits: int = 4, error: Any = None) -> str:
    """`95.75 %` for 0.9575, with its standard error where there is one."""
    if not is_number(value):
        return NOTHING
    return f"{plus_minus(value, error, 100.0) if error else number(100.0 * value, digits)} %"


def ratio(value: Any, reference: Any) -> str:
    """`1.25x`; `—` where either is missing."""
    if not is_number(value) or not is_number(reference) or not reference:
        return NOTHING
    return f"{number(value / reference, 3)}x"


def size(value: Any) -> str:
    """`1.486 MB`; a kilobyte is 1000 bytes."""
    if not is_number(value):
        return NOTHING
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{number(value)} {unit}"
        value = value / 1000
    return f"{number(value)} GB"


def span(start: Any, end: Any) -> str:
    """The first and the last of the positions from `start` up to, but not including, `end`: of 32 and 60, 32 and 59."""
    if not is_number(start) or not is_number(end):
        return NOTHING
    return number(start) if end - start <= 1 else f"{number(start)}\N{EN DASH}{number(end - 1)}"


def counted(count: int, word: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count} {word}" + ("" if count == 1 else "s")


def sort_key(value: Any) -> str:
    """The full number, for a script that sorts; empty for no value."""
    return repr(value) if is_number(value) else ""


def is_number(value: Any) -> bool:
    """Whether it is a finite number; a truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def embedding_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What [`hfcompress.evaluation.embedding.turned`] has found, as a table tells it: label and value."""
    if "cosine_mean" not in found:
        return []
    rows = [
        ("cosine to the original, of a token", f"{found['cosine_mean']:.5f} (least {found['cosine_min']:.4f})"),
        ("of a row's mean", f"{found['embedding_cosine_mean']:.5f} (least {found['embedding_cosine_min']:.4f})"),
    ]
    if found["likeness_change"] is not None and found["likeness_spread"] is not None:
        told = f"{found['likeness_change']:.5f}, where they differ by {found['likeness_spread']:.5f}"
        rows.append(("change of the cosine of two rows", told))
    return rows
