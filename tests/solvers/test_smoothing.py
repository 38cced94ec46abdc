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
"""Factors before rounding: the candidates, and what each costs, against the definitions in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.solvers import smoothing
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.rtn import rtn
from hfcompress.solvers.smoothing import (
    Magnitudes,
    awq_candidates,
    gram_losses,
    migration_losses,
    round_scaled,
    smoothquant_scales,
)


def make_problem(seed: int = 0, rows: int = 12, columns: int = 64, tokens: int = 200):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    spread = torch.exp(torch.randn(columns, generator=generator))
    inputs = torch.randn(tokens, columns, generator=generator) * spread
    magnitudes = Magnitudes(inputs.abs().mean(0), inputs.abs().amax(0), weight.abs().mean(0), weight.abs().amax(0))
    return weight, inputs, magnitudes


def nearest(values: list[float], step: float, grid: Grid) -> list[float]:
    return [min(max(round(v / step), grid.q_min), grid.q_max) * step for v in values]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), grid=st.integers(1, 20))
def test_candidates_are_the_papers(seed, grid):
    _, _, magnitudes = make_problem(seed)
    candidates = awq_candidates(magnitudes, grid)
    assert len(candidates) == grid
    x, w = magnitudes.input_mean.double(), magnitudes.weight_mean.double()
    for index, (ratio, scales) in enumerate(candidates):
        assert ratio == pytest.approx(index / max(grid - 1, 1))
        expected = x**ratio / w ** (1 - ratio)
        expected /= math.sqrt(expected.max() * expected.min())
        torch.testing.assert_close(scales.double(), expected, rtol=2**-8, atol=0)
        assert scales.max() * scales.min() == pytest.approx(1, rel=2**-7)
        assert torch.equal(scales, scales.bfloat16().float())


def test_smoothquant_takes_the_largest_magnitudes():
    _, _, magnitudes = make_problem()
    for strength in (0.0, 0.5, 0.8, 1.0):
        expected = magnitudes.input_peak.double() ** strength / magnitudes.weight_peak.double() ** (1 - strength)
        found = smoothquant_scales(magnitudes, strength).double()
        ratio = found / expected
        torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0].item()), rtol=2**-7, atol=0)
    balanced = smoothquant_scales(magnitudes, 0.5)  # at one half, inputs and weights end with the same ranges
    inputs, weights = magnitudes.input_peak / balanced, magnitudes.weight_peak * balanced
    torch.testing.assert_close(inputs / inputs[0], weights / weights[0], rtol=2**-6, atol=0)


def test_channels_without_input_or_weight_keep_finite_factors():
    _, _, m = make_problem()
    zero = torch.zeros_like(m.input_mean)
    some = m.input_mean.clone()
    some[:3] = 0
    for inputs, weights in ((zero, m.weight_mean), (some, m.weight_mean), (m.input_mean, zero), (zero, zero)):
        for _, scales in awq_candidates(Magnitudes(inputs, inputs, weights, weights), 5):
            assert torch.isfinite(scales).all()
            assert (scales > 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_loss_is_the_mean_squared_output_error(bits, search, symmetric):
    weight, inputs, magnitudes = make_problem()
    gram = inputs.T @ inputs / len(inputs)
    grid = Grid(bits, 32, symmetric)
    factors = [torch.ones(64), *(s for _, s in awq_candidates(magnitudes, 5))]
    found = gram_losses(weight, factors, gram, grid, torch.bfloat16, search)
    for loss, scales in zip(found, factors, strict=True):
        rounded = rtn(weight * scales, grid, torch.bfloat16, search, gram.diagonal() / scales.square()).dequantize()
        off = inputs.double() @ (rounded.double() / scales.double() - weight.double()).T
        assert loss.item() == pytest.approx(off.square().sum(1).mean().item(), rel=1e-4)


def test_rounding_with_factors_is_the_definition():
    """One scale per row, plain range: by hand, number by number."""
    weight, inputs, magnitudes = make_problem(rows=4, columns=8)
    scales = awq_candidates(magnitudes, 3)[1][1]
    grid = Grid(3)
    found = round_scaled(weight, scales, inputs.square().mean(0), grid, torch.float32, search=False)
    for row, rounded in zip(weight.double() * scales.double(), found, strict=True):
        extreme = max(row.tolist(), key=abs)
        expected = nearest(row.tolist(), extreme / grid.q_min, grid)
        assert rounded.tolist() == pytest.approx(
            [v / s for v, s in zip(expected, scales.tolist(), strict=True)], rel=1e-4
        )


def test_many_candidates_at_once_or_one_by_one_and_how_many_gemms(monkeypatch):
    weight, inputs, magnitudes = make_problem()
    gram = inputs.T @ inputs / len(inputs)
    factors = [s for _, s in awq_candidates(magnitudes, 7)]
    gemms = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (gemms.append(a.shape), matmul(a, b))[1])
    together = gram_losses(weight, factors, gram, Grid(4, 32), torch.float32, True)
    assert gemms == [(7 * 12, 64)]
    monkeypatch.setattr(smoothing, "VALUES_AT_ONCE", 3 * weight.numel())
    parts = gram_losses(weight, factors, gram, Grid(4, 32), torch.float32, True)
    assert [len(g) for g in [range(s[0]) for s in gemms[1:]]] == [36, 36, 12]
    torch.testing.assert_close(parts, together, rtol=1e-5, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4]), power=st.sampled_from([0.25, 2.0, 8.0]))
def test_factors_that_are_all_one_power_of_two_change_nothing(seed, bits, power):
    weight, inputs, _ = make_problem(seed)
    gram = inputs.T @ inputs / len(inputs)
    ones = torch.ones(64)
    losses = gram_losses(weight, [ones, power * ones], gram, Grid(bits, 32), torch.float32, True)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_best_factors_beat_none_where_channels_differ(bits):
    """Two channels carry most of the input: scaling them up must pay, and by much."""
    weight, inputs, _ = make_problem(columns=64)
    inputs = torch.randn(400, 64, generator=torch.Generator().manual_seed(3))
    inputs[:, [7, 40]] *= 30
    gram = inputs.T @ inputs / len(inputs)
    mean = inputs.abs().mean(0)
    magnitudes = Magnitudes(mean, mean, weight.abs().mean(0), weight.abs().amax(0))
    factors = [torch.ones(64), *(s for _, s in awq_candidates(magnitudes, 20))]
    losses = gram_losses(weight, factors, gram, Grid(bits, -1), torch.float32, False)
    assert losses.min() < 0.5 * losses[0]


def test_the_forecast_of_migration_is_its_formula_and_knows_no_common_factor():
    weight, inputs, magnitudes = make_problem()
    peak, squares = inputs.abs().amax(0), inputs.square().mean(0)
    scales = smoothquant_scales(magnitudes, 0.5)
    [found, tripled] = migration_losses(weight, [scales, 3 * scales], peak, squares).tolist()
    assert tripled == pytest.approx(found, rel=1e-5)
    x_range = max(p / s for p, s in zip(peak.tolist(), scales.tolist(), strict=True))
    of_inputs = x_range**2 * sum(
        (w * s) ** 2 for row in weight.tolist() for w, s in zip(row, scales.tolist(), strict=True)
    )
    of_weights = sum(
        max(abs(w) * s for w, s in zip(row, scales.tolist(), strict=True)) ** 2 for row in weight.tolist()
    ) * sum(q / s**2 for q, s in zip(squares.tolist(), scales.tolist(), strict=True))
    assert found == pytest.approx(of_inputs + of_weights, rel=1e-5)


def test_the_forecast_tells_when_eight_bits_gain():
    """Weights rounded per row and inputs per token to 8 bits, for real: the forecast orders them as the error does."""
    weight, _, _ = make_problem(rows=32)
    inputs = torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    inputs[:, 5] *= 60

    def error(scales) -> float:
        def rounded(values):
            step = values.abs().amax(1, keepdim=True) / 127
            return (values / step).round() * step

        off = rounded(inputs / scales) @ rounded(weight * scales).T - inputs @ weight.T
        return off.square().mean().item()

    m = Magnitudes(*(2 * (inputs.abs().amax(0),)), *(2 * (weight.abs().amax(0),)))
    factors = [torch.ones(64), *(smoothquant_scales(m, strength) for strength in (0.0, 0.5, 1.0))]
    forecast = migration_losses(weight, factors, m.input_peak, inputs.square().mean(0))
    errors = [error(scales) for scales in factors]
    assert int(forecast.argmin()) == errors.index(min(errors)) == 2
    assert errors[2] < 0.2 * errors[0]
    assert forecast[2] < 0.2 * forecast[0]
