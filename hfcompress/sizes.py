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
"""Sizes as a person writes them."""

from hfcompress.errors import InvalidValueError


def parse_size(text: str) -> int:
    """
    Bytes from `8GB`, `512 MB`, `1GiB` or a plain number; `GB` is 1e9.

    Raises:
        InvalidValueError: it is no size.
    """
    units = {"": 1, "B": 1}
    for power, prefix in enumerate("KMGT", 1):
        units |= {f"{prefix}B": 1000**power, f"{prefix}IB": 1024**power}
    number = text.strip().rstrip("BbIiKkMmGgTt ").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        if float(number) < 0:
            raise ValueError
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise InvalidValueError(f"'{text}' is no size; write it like 8GB, 512MB or a number of bytes.") from error
