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

import pytest

from hfcompress.errors import InvalidValueError
from hfcompress.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        ("5B", 5),
        ("1kb", 1000),
        ("1KB", 1000),
        ("512 MB", 512_000_000),
        ("8GB", 8_000_000_000),
        (" 8 gb ", 8_000_000_000),
        ("2TB", 2_000_000_000_000),
        ("1KiB", 1024),
        ("1MiB", 1024**2),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("1TiB", 1024**4),
        ("0.5 kB", 500),
        ("1e3MB", 1_000_000_000),
    ],
)
def test_sizes(text, size):
    parsed = parse_size(text)
    assert parsed == size
    assert type(parsed) is int


@pytest.mark.parametrize(
    "text", ["", " ", "GB", "8XB", "8G", "eight GB", "8 GB extra", "8GBB", "1.2.3MB", "inf", "nan"]
)
def test_what_is_no_size(text):
    with pytest.raises(InvalidValueError) as error:
        parse_size(text)
    assert str(error.value) == f"'{text}' is no size; write it like 8GB, 512MB or a number of bytes."


def test_a_size_below_zero_is_no_size():
    with pytest.raises(InvalidValueError, match="is no size"):
        parse_size("-8GB")
