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
"""Factors that move from a linear's input into its weight before rounding: which ones to try, and what each one costs.

With factors `s > 0` per input channel, `W X = (W diag(s)) (diag(s)^-1 X)`. Rounding is not so invariant: a column that
was scaled up loses less, and what it loses is divided by its factor again. AWQ (Lin et al., arXiv 2306.00978) looks for
the `s` of least output error among powers of the mean magnitudes of inputs and weights; SmoothQuant (Xiao et al., arXiv
2211.10438) takes `s` from the largest magnitudes, so that inputs can be rounded too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.solvers.grid import Grid
from hfcompress.solvers.rtn import rtn


LEAST = 1e-4  # of the largest magnitude: what counts as no magnitude at all
VALUES_AT_ONCE = 2**22  # values of the differences that one GEMM takes


@dataclass(frozen=True)
class Magnitudes:
    """
    What is known of the channels that a producer feeds, each over all inputs and weights that the channel touches.

    Args:
        input_mean (`Tensor`): `(channels,)`, mean of `|X|`.
        input_peak (`Tensor`): `(channels,)`, largest `|X|`.
        weight_mean (`Tensor`): `(channels,)`, mean of `|W|` over the rows of all consumers.
        weight_peak (`Tensor`): `(channels,)`, largest `|W|`.
    """

    input_mean: Tensor
    input_peak: Tensor
    weight_mean: Tensor
    weight_peak: Tensor


def awq_candidates(magnitudes: Magnitudes, grid: int) -> list[tuple[float, Tensor]]:
    """
    `mean|X|^r / mean|W|^(1 - r)` for `r` from 0 to 1, normalised (arXiv 2306.00978, equation 5, with the weights' share
    that its code adds).

    Args:
        magnitudes (`Magnitudes`): of the channels.
        grid (`int`): how many values of `r`, evenly spaced.

    Returns:
        `list[tuple[float, Tensor]]`: `r` and factors `(channels,)`.
    """
    ratios = torch.linspace(0, 1, grid).tolist()
    return [(r, _balance(magnitudes.input_mean, magnitudes.weight_mean, r)) for r in ratios]


def smoothquant_scales(magnitudes: Magnitudes, strength: float) -> Tensor:
    """`max|X|^strength / max|W|^(1 - strength)`, normalised: `(channels,)` (arXiv 2211.10438, equation 4)."""
    return _balance(magnitudes.input_peak, magnitudes.weight_peak, strength)


def _balance(inputs: Tensor, weights: Tensor, power: float) -> Tensor:
    """
    Normalised so that the largest and the least factor are each other's inverse: no common factor is moved. To eight
    significant bits: finer ones change no result for the better, but would with the order of a sum over processes.
    """
    scales = _positive(inputs) ** power / _positive(weights) ** (1 - power)
    return (scales / (scales.max() * scales.min()).sqrt()).bfloat16().float()


def _positive(values: Tensor) -> Tensor:
    peak = values.max()
    return values.clamp(min=(peak * LEAST).item()) if peak > 0 else torch.ones_like(values)


def round_scaled(
    weight: Tensor, scales: Tensor, squares: Tensor, grid: Grid, scale_dtype: torch.dtype, search: bool
) -> Tensor:
    """
    What becomes of a weight that is rounded with its columns multiplied by `scales`, seen with unscaled inputs:
    `Q(W diag(s)) diag(s)^-1`. The scales of the grid come from [`hfcompress.solvers.scales.choose_scales`] with each
    column's mean squared input as its importance, as the step that rounds will choose them; that is the clip search.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32.
        scales (`Tensor`): `(in_features,)`.
        squares (`Tensor`): `(in_features,)`, mean of the squares of the unscaled inputs.
        grid (`Grid`): the grid.
        scale_dtype (`torch.dtype`): the dtype that the grid's scales are stored in.
        search (`bool`): whether these are searched.
    """
    importance = squares / scales.square()
    return rtn(weight * scales, grid, scale_dtype, search, importance).dequantize() / scales


def gram_losses(
    weight: Tensor,
    candidates: Sequence[Tensor],
    gram: Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
    search: bool,
) -> Tensor:
    """
    `tr(dW H dW^T)` for every candidate, `dW` being what [`round_scaled`] changes: the mean squared error of the
    linear's output. One GEMM for as many candidates as fit, so never more than there are candidates.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32.
        candidates (`list[Tensor]`): `(in_features,)` each.
        gram (`Tensor`): `X^T X / tokens` of the unscaled inputs, `(in_features, in_features)` float32.
        grid (`Grid`): the grid.
        scale_dtype (`torch.dtype`): the dtype that the grid's scales are stored in.
        search (`bool`): whether these are searched.

    Returns:
        `Tensor`: float64 `(len(candidates),)`.
    """
    together = max(1, VALUES_AT_ONCE // weight.numel())
    losses = []
    for start in range(0, len(candidates), together):
        part = candidates[start : start + together]
        off = torch.cat(
            [round_scaled(weight, s, gram.diagonal(), grid, scale_dtype, search).sub_(weight) for s in part]
        )
        losses.append((off @ gram).mul_(off).view(len(part), -1).sum(1, dtype=torch.float64))
    return torch.cat(losses)


def migration_losses(weight: Tensor, candidates: Sequence[Tensor], peak: Tensor, squares: Tensor) -> Tensor:
    """
    A forecast, up to a factor that all share, of the output error where weights (a range per row) and inputs (one
    range) are rounded to equally many levels: a rounding error is as large as its range allows and independent of all
    others. Multiplying all factors by one number changes nothing.

    Args:
        weight (`Tensor`): `(out_features, in_features)`, of all consumers.
        candidates (`list[Tensor]`): `(in_features,)` each.
        peak (`Tensor`): `(in_features,)`, largest `|X|`.
        squares (`Tensor`): `(in_features,)`, mean of `X^2`.

    Returns:
        `Tensor`: float64 `(len(candidates),)`.
    """
    losses = []
    for s in candidates:
        scaled = weight.double() * s
        of_inputs = (peak / s).amax().double().square() * scaled.square().sum()
        of_weights = scaled.abs().amax(1).square().sum() * (squares / s.square()).double().sum()
        losses.append(of_inputs + of_weights)
    return torch.stack(losses)
