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
"""Unpacking weights of 4 bits, as torch's kernel for a CPU has them, for products with many tokens."""

import numpy as np
from numba import njit, prange


@njit(parallel=True, fastmath=True, cache=True)
def unpack_tiles(packed, scales, offsets, group, out):
    """
    The values of a few tiles, transposed.

    Args:
        packed (`ndarray`): uint8 `(tiles, columns, half)`: byte `r` of a column holds the code of row `r` of the tile in its lower
            half and that of row `r + half` in its upper. With AVX-512 `half` is 32, with AVX2 16.
        scales (`ndarray`): float32 `(columns / group, 2 * half * tiles)`.
        offsets (`ndarray`): float32, likewise: what code zero stands for.
        group (`int`): columns that share a scale.
        out (`ndarray`): float32 `(columns, 2 * half * tiles)`, written.
    """
    tiles, columns, half = packed.shape
    for k in prange(columns):
        g = k // group
        for t in range(tiles):
            low, high = 2 * t * half, (2 * t + 1) * half
            for r in range(half):
                both = packed[t, k, r]
                out[k, low + r] = scales[g, low + r] * np.float32(both & 15) + offsets[g, low + r]
                out[k, high + r] = scales[g, high + r] * np.float32(both >> 4) + offsets[g, high + r]
