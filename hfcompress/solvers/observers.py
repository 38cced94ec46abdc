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
"""The range of activations that pass by, for the one scale that a static quantizer stores.

How it works: magnitudes are counted by their value in bfloat16. There are only 2**15 of those, so the histogram has the
same bins for every tensor: nothing is rescaled as larger values come, counts of several processes are simply added, and
the order in which values come does not matter. For bfloat16 activations it loses nothing; others are moved by at most
one part in 256. Beside it the largest magnitude is kept as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.solvers.grid import Grid


MAGNITUDES = 2**15  # of bfloat16 without the sign
PERCENTILE = 0.9999
SHRINK_TO, CANDIDATES = 0.1, 181  # of the MSE search: steps of half a hundredth


@dataclass(frozen=True)
class Histogram:
    """
    How often each magnitude was seen.

    Args:
        counts (`Tensor`): int64 `(2**15,)`, by the bits of the magnitude in bfloat16.
        largest (`Tensor`): float32 scalar, the largest magnitude, exactly.
    """

    counts: Tensor
    largest: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> "Histogram":
        """Nothing seen yet."""
        counts = torch.zeros(MAGNITUDES, dtype=torch.int64, device=device)
        return cls(counts, torch.zeros((), device=device))

    def add(self, values: Tensor) -> "Histogram":
        """This histogram and `values`, of any shape and floating dtype, counted into it."""
        if values.numel() == 0:
            return self
        magnitudes = values.detach().abs().flatten()
        bits = magnitudes.bfloat16().view(torch.int16).int() & (MAGNITUDES - 1)  # a NaN may keep its sign
        counts = self.counts + torch.bincount(bits, minlength=MAGNITUDES)
        return Histogram(counts, torch.maximum(self.largest, magnitudes.max().float()))

    def __add__(self, other: "Histogram") -> "Histogram":
        return Histogram(self.counts + other.counts, torch.maximum(self.largest, other.largest))

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """What was seen, ascending, and how often: float64 each."""
        found = self.counts.nonzero()[:, 0]
        return found.to(torch.int16).view(torch.bfloat16).double(), self.counts[found].double()


def minmax(histogram: Histogram, grid: Grid) -> Tensor:
    """The largest magnitude: nothing is clipped."""
    return histogram.largest.double()


def percentile(histogram: Histogram, grid: Grid, share: float = PERCENTILE) -> Tensor:
    """
    The least magnitude that no more than `1 - share` of all values exceed (arXiv 2004.09602, section 5); the largest
    where that is zero.
    """
    values, counts = histogram.magnitudes()
    index = torch.searchsorted(counts.cumsum(0), share * counts.sum())
    found = torch.minimum(values[index.clamp(max=len(values) - 1)], histogram.largest.double())
    return torch.where(found > 0, found, histogram.largest.double())


def mse(histogram: Histogram, grid: Grid) -> Tensor:
    """
    The range of least squared error `sum_x (Q(x) - x)^2`, tried from the largest magnitude downwards in even steps.

    On an integer grid clipping pays for a finer step. A float grid's step is relative to the value, so that there it
    is rarely worth clipping anything.
    """
    values, counts = histogram.magnitudes()
    largest = histogram.largest.double()
    candidates = largest * torch.linspace(1, SHRINK_TO, CANDIDATES, dtype=torch.float64, device=largest.device)
    errors = []
    for candidate in candidates:
        scale = scale_of(candidate, grid)
        errors.append(((grid.round(values, scale, None) * scale - values).square() * counts).sum())
    return candidates[torch.stack(errors).argmin()]


OBSERVERS = {"minmax": minmax, "percentile": percentile, "mse": mse}


def scale_of(range_: Tensor, grid: Grid) -> Tensor:
    """
    The scale at which `[-range_, range_]` fills the codes: over 127.5 for 8-bit integers, over 448 for E4M3, as
    compressed-tensors computes the scales of dynamic inputs.
    """
    return 2 * range_ / (grid.q_max - grid.q_min)


def static_scale(histogram: Histogram, grid: Grid, observer: str, dtype: torch.dtype) -> Tensor:
    """
    The scale to store for values like those seen.

    Args:
        histogram (`Histogram`): what was seen.
        grid (`Grid`): the codes that the values will be rounded to; symmetric.
        observer (`str`): a key of `OBSERVERS`.
        dtype (`torch.dtype`): what the scale is stored in.

    Returns:
        `Tensor`: `(1,)`, positive; one where all values were zero.
    """
    if histogram.largest == 0:
        return torch.ones(1, dtype=dtype, device=histogram.largest.device)
    scale = scale_of(OBSERVERS[observer](histogram, grid), grid)
    return scale.clamp(min=torch.finfo(dtype).tiny).to(dtype).reshape(1)
