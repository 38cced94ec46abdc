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
GPTQ for codes that will be entropy-coded: no code is clipped, and the steps are those of least loss at a given rate.

The loss is `sum_ij F_i D_j z_ij^2` with `z_ij` the rounding errors ([`hfcompress.solvers.two_sided`]). Where nothing is
clipped each is spread evenly over its step, so the loss is `sum_ij F_i D_j s_ij^2 / 12`, while the rate falls by one bit
for every doubling of a step, whichever weight's it is: at a given rate the loss is least where `F_i D_j s_ij^2` is the
same for all. So steps are `c / sqrt(F_i D_j)` with one `c`, found for the rate (for columns: WaterSIC, arXiv 2603.04956;
that uniform steps lose a quarter of a bit against any code: Gish and Pierce 1968).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.solvers.curvature import RowFactor
from hfcompress.solvers.entropy import SYMBOLS, bits_of, classes_of, counted, index_bits
from hfcompress.solvers.gptq import Factor
from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.two_sided import sweep_two_sided


PER_OCTAVE = 16  # steps that a row or column may have
EXPONENTS = 256
SIDE_BITS = 16  # of a row or a column: its step, and its class
STEP_BITS = 32  # of the step that all have in common
ENOUGH = 1 << 20  # weights from which the rate at some step is told
OCTAVES = 12  # on either side of the weights' root mean square, in which the step lies
HALVINGS = 16
FINEST, COARSEST = 6, 4  # octaves below and above that root mean square, between which curves are told
SWEEPS = 8
CLOSE = 0.003  # of the rate
ROOM = 112.0  # largest code of a weight as it is: the error that is fed back needs some of the others


@dataclass(frozen=True)
class Steps:
    """
    Args:
        rows (`Tensor`): float32 `(out_features,)`, of which one is 1, all whole powers of `2^(1/16)`.
        columns (`Tensor`): float32 `(in_features,)`, likewise.
        least (`float`): the logarithm to base 2 of what the least of the steps is at `c = 1`.
    """

    rows: Tensor
    columns: Tensor
    least: float

    @classmethod
    def of(cls, factor: Factor, rows: RowFactor) -> "Steps":
        """Those of least loss."""
        each = [rows.importance.cpu().rsqrt(), factor.importance.cpu().rsqrt()]
        least = sum(steps.min().log2().item() for steps in each)
        return cls(*(powers(exponents(steps)) for steps in each), least)


def exponents(steps: Tensor) -> Tensor:
    """The powers of `2^(1/16)` nearest to the steps, over the least of them: uint8, as they are stored."""
    powers = (PER_OCTAVE * steps.double().log2()).round()
    return (powers - powers.min()).clamp(max=EXPONENTS - 1).to(torch.uint8)


def powers(exponents: Tensor) -> Tensor:
    """The inverse of [`exponents`], but for a common factor: float32."""
    return (exponents.double() / PER_OCTAVE).exp2().float()


def symbols_of(codes: Tensor) -> Tensor:
    """int8 codes 0, -1, 1, -2, ... as uint8 symbols 0, 1, 2, 3, ..."""
    return ((codes << 1) ^ (codes >> 7)).view(torch.uint8)


def codes_of(symbols: Tensor) -> Tensor:
    """The inverse of [`symbols_of`]."""
    return ((symbols >> 1) ^ (symbols & 1).neg()).view(torch.int8)


MAGNITUDES = codes_of(torch.arange(SYMBOLS, dtype=torch.uint8)).float().abs()


def rate(codes: Tensor) -> float:
    """
    Bits per weight of all that is stored of them.

    Args:
        codes (`Tensor`): int8 `(out_features, in_features)`.
    """
    symbols = symbols_of(codes)
    return (bits_of(counted(symbols, classes_of(symbols, MAGNITUDES))) + _beside(codes.shape)) / codes.numel()


def _beside(shape: torch.Size) -> int:
    """Bits of what is stored beside the symbols and their tables."""
    return SIDE_BITS * sum(shape) + index_bits(shape) + STEP_BITS


def raised(most: Tensor, logarithm: float) -> Tensor:
    """
    What steps of `2^logarithm` are multiplied by so that no code of a row is out of range: whole powers of `2^(1/16)`, 1 where
    none is.

    Args:
        most (`Tensor`): float32 `(rows,)`: the largest magnitudes, in units of the row's step.
        logarithm (`float`): to base 2.
    """
    octaves = most.double().clamp(min=1e-300).log2() - logarithm - math.log2(ROOM)
    return ((PER_OCTAVE * octaves).ceil().clamp(min=0) / PER_OCTAVE).exp2().float()


class Unswept:
    """
    The rate of a weight at some step, told without any error being fed back, from some of its rows.

    Args:
        weight (`Tensor`): float32 `(out_features, in_features)`.
        steps (`Steps`): the steps, but for a factor.
        enough (`int`): weights that are looked at.
    """

    def __init__(self, weight: Tensor, steps: Steps, enough: int = ENOUGH):
        part = slice(None, None, max(1, weight.numel() // enough))
        self.ratio = weight[part].cpu() / steps.columns / steps.rows[part, None]
        self.more = _beside(weight.shape) / weight.numel() - _beside(self.ratio.shape) / self.ratio.numel()
        self.steps, self.most = steps, self.ratio.abs().amax(1)
        self.middle = self.ratio.square().mean().sqrt().clamp(min=1e-30).log2().item()

    def rate(self, logarithm: float) -> float:
        """Bits per weight where the steps are multiplied by two to this power."""
        codes = (self.ratio * 2.0**-logarithm / raised(self.most, logarithm)[:, None]).round_()
        return rate(codes.to(torch.int8)) + self.more

    def curve(self) -> "Curve":
        """The rates at steps of half an octave, all that may be asked for among them."""
        points = torch.arange(-FINEST * 2, COARSEST * 2 + 1) / 2 + self.middle
        rates = torch.tensor([self.rate(logarithm) for logarithm in points.tolist()])
        return Curve(points[0].item() - self.steps.least, rates)

    def step(self, bits: float) -> float:
        """The logarithm of the factor at which the rate is this."""
        low, high = self.middle - OCTAVES, self.middle + OCTAVES
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.rate(middle) > bits else (low, middle)
        return low


@dataclass(frozen=True)
class Curve:
    """
    How the rate of a linear falls with the step.

    Args:
        first (`float`): the logarithm to base 2 of the first `c`.
        rates (`Tensor`): float32 `(points,)`: bits per weight there and at every further half octave.
    """

    first: float
    rates: Tensor

    def at(self, logarithm: float) -> float:
        """The rate at some `c`."""
        place = min(max(2 * (logarithm - self.first), 0.0), len(self.rates) - 1.0)
        below = min(int(place), len(self.rates) - 2)
        return torch.lerp(self.rates[below], self.rates[below + 1], place - below).item()


def gptq_coded(
    target: Tensor,
    factor: Factor,
    rows: RowFactor,
    grid: Grid,
    sweep: Callable[[Tensor, Tensor], Tensor],
) -> QuantizedWeight:
    """
    Round `target` so that the codes take `grid.rate` bits each, and `tr(C (V - Q) H (V - Q)^T)` is small.

    Args:
        target (`Tensor`): `(out_features, in_features)` float32.
        factor (`Factor`): of the Gram matrix.
        rows (`RowFactor`): of the outputs.
        grid (`Grid`): of type `"coded"`.
        sweep (`Callable`): the codes, int8 like the target, for steps of the rows and of the columns, float32
            `(out_features,)` and `(in_features,)`; see [`sweep_coded`].
    """
    steps = Steps.of(factor, rows)
    assert grid.rate is not None
    unswept = Unswept(target, steps)
    most = (target.cpu() / steps.columns / steps.rows[:, None]).abs().amax(1)
    logarithm, tried = unswept.step(grid.rate), []
    best: QuantizedWeight | None = None
    for _ in range(SWEEPS):
        scales = steps.rows * 2.0**logarithm * raised(most, logarithm)
        codes = sweep(scales, steps.columns)
        off = rate(codes) - grid.rate
        if best is None or abs(off) < min(abs(other) for other, _ in tried):
            best = QuantizedWeight(codes, scales[:, None], None, grid, steps.columns)
        if abs(off) < CLOSE * grid.rate:
            break
        tried.append((off, logarithm))
        logarithm = _next_step(unswept, tried, grid.rate)
    assert best is not None
    return best.to(target.device)


def _next_step(unswept: Unswept, tried: list[tuple[float, float]], bits: float) -> float:
    """
    The step to try where others were so far off: between them if one took too many bits and one too few, otherwise by how
    the rate without a sweep falls, an octave at most.
    """
    above = [(logarithm, off) for off, logarithm in tried if off > 0]
    below = [(logarithm, off) for off, logarithm in tried if off <= 0]
    if above and below:
        (fine, more), (coarse, less) = max(above), min(below)
        return fine + min(max(more / (more - less), 0.1), 0.9) * (coarse - fine)
    logarithm, off = max(above) if above else min(below)
    move = unswept.step(unswept.rate(logarithm) - off) - logarithm
    return logarithm + min(max(move, -1.0), 1.0)


def sweep_coded(
    target: Tensor,
    factor: Factor,
    rows: RowFactor,
    scales: Tensor,
    columns: Tensor,
    grid: Grid,
    keep: Tensor | None = None,
) -> Tensor:
    """
    The codes for some steps: int8 `(out_features, in_features)`.

    Args:
        target (`Tensor`): `(out_features, in_features)` float32, some rows of a weight.
        factor (`Factor`): of the Gram matrix.
        rows (`RowFactor`): of these rows.
        scales (`Tensor`): float32 `(out_features,)`.
        columns (`Tensor`): float32 `(in_features,)`: a code's value is the code times both.
        grid (`Grid`): of type `"coded"`.
        keep (`Tensor`, *optional*): bool, like the target: which entries may be other than zero.
    """
    order = factor.order.cpu()
    ordered = target.cpu()[rows.order].T[order].contiguous()
    steps = columns[order][:, None] * scales[rows.order]
    stays = torch.ones(0, 0, dtype=torch.bool) if keep is None else keep.cpu()[rows.order].T[order].contiguous()
    codes = sweep_two_sided(ordered, factor.feedback.cpu(), rows, steps, None, grid, stays)
    unordered = torch.empty_like(codes.T)
    unordered[rows.order[:, None], order] = codes.T
    return unordered
