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
"""
How much of the evaluation was calibrated on.

Two token streams share text where they share a window of 32 tokens, wherever it lies in their rows. The calibration's
windows are kept as a sketch, the smallest of their hashes (Bar-Yossef et al. 2002), so that a checkpoint can carry it
and a later evaluation can still tell.
"""

from collections.abc import Sequence

import numpy as np

from hfcompress.calibration.tokens import Tokens


WINDOW = 32
SKETCH = 512  # hashes
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def sketch(tokens: Tokens) -> list[str]:
    """The smallest hashes of the windows of `tokens`, in hexadecimal: all of them where there are few."""
    return [f"{value:016x}" for value in np.unique(_hashes(tokens))[:SKETCH]]


def overlap(tokens: Tokens, of: Sequence[str]) -> float:
    """
    The share of the windows of `tokens` that also occur in the text that a sketch was made of: exact where the sketch
    holds all its windows, an unbiased estimate otherwise.

    Args:
        tokens (`Tokens`): the evaluation's.
        of (`Sequence[str]`): what [`sketch`] made of the calibration's.
    """
    known = np.array([int(value, 16) for value in of], dtype=np.uint64)
    hashes = _hashes(tokens)
    if len(known) == SKETCH:
        hashes = hashes[hashes <= known.max()]
    return float(np.isin(hashes, known).mean()) if len(hashes) else 0.0


def _hashes(tokens: Tokens) -> np.ndarray:
    """Polynomial hashes of all windows that hold no padding: uint64, flat."""
    ids = tokens.input_ids.astype(np.uint64)
    width = min(WINDOW, ids.shape[1])
    count = ids.shape[1] - width + 1
    hashes = np.zeros((len(ids), count), dtype=np.uint64)
    whole = np.ones((len(ids), count), dtype=bool)
    for offset in range(width):
        hashes = (hashes + ids[:, offset : offset + count] + np.uint64(1)) * MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
        if tokens.mask is not None:
            whole &= tokens.mask[:, offset : offset + count]
    return hashes[whole]
