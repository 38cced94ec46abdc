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
"""Rounding for entropy coding: the rate is the one that is asked for, and the loss the least that steps can have there."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.formats.native import Native
from hfcompress.solvers.coded import (
    Steps,
    Unswept,
    codes_of,
    exponents,
    gptq_coded,
    powers,
    rate,
    sweep_coded,
    symbols_of,
)
from hfcompress.solvers.curvature import factorize_rows, indifferent
from hfcompress.solvers.gptq import factorize, gptq
from hfcompress.solvers.grid import Grid


ROWS, COLUMNS = 192, 256


def problem(seed: int = 0):
    """A weight, a Gram matrix and a curvature, all uneven."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = normal(3000, 60) @ normal(60, COLUMNS) * 0.4 + normal(3000, COLUMNS)
    inputs *= normal(COLUMNS).exp()
    gradients = normal(2000, 40) @ normal(40, ROWS) * 0.4 + normal(2000, ROWS)
    gradients *= (0.5 * normal(ROWS)).exp()
    weight = normal(ROWS, COLUMNS) * (0.3 * normal(ROWS, 1)).exp()
    return weight, inputs.T @ inputs / 3000, gradients.T @ gradients / 2000


def solved(weight, factor, rows, bits, steps=None):
    grid = Grid(8, type="coded", rate=bits)

    def sweep(scales, columns):
        return sweep_coded(weight, factor, rows, scales, columns, grid)

    if steps is None:
        return gptq_coded(weight, factor, rows, grid, sweep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "of", classmethod(lambda cls, *_: steps))
        return gptq_coded(weight, factor, rows, grid, sweep)


def loss(weight, found, gram, curvature=None) -> float:
    error = (weight - found.dequantize()).double()
    weighed = error if curvature is None else curvature.double() @ error
    return ((error @ gram.double()) * weighed).sum().item()


@given(st.integers(-127, 127))
def test_a_code_is_a_symbol_and_back(code):
    codes = torch.tensor([code], dtype=torch.int8)
    assert codes_of(symbols_of(codes)) == codes
    assert symbols_of(codes).item() == (2 * code if code >= 0 else -2 * code - 1)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_steps_are_stored_within_two_parts_in_a_hundred(steps):
    steps = torch.tensor(steps)
    steps = steps.clamp(max=steps.min() * 2.0**15)
    stored = powers(exponents(steps)) * steps.min()
    assert ((stored / steps).log2().abs() <= 1 / 16 + 1e-6).all()
    assert torch.equal(exponents(powers(exponents(steps))), exponents(steps))


@pytest.mark.parametrize("bits", [1.5, 2.2, 3.0, 4.5])
@pytest.mark.parametrize("curved", [False, True])
def test_it_takes_the_bits_that_were_asked_for(bits, curved):
    weight, gram, curvature = problem()
    rows = factorize_rows([curvature[:96, :96], curvature[96:, 96:]]) if curved else indifferent(ROWS)
    found = solved(weight, factorize(gram), rows, bits)
    stored = sum(tensor.nbytes for tensor in Native().pack(found).values())
    assert 8 * stored / weight.numel() == pytest.approx(bits, rel=0.01)
    assert rate(found.codes) == pytest.approx(8 * stored / weight.numel(), rel=0.005)
    assert torch.equal(Native().unpack(Native().pack(found), found.grid).dequantize(), Native().values(found))
    torch.testing.assert_close(Native().values(found), found.dequantize(), rtol=1e-6, atol=0)


def test_few_bits_are_found_too_and_are_not_all_zeros():
    """Where errors that are fed back add to the rate, so that it is far from what it is without a sweep."""
    weight, gram, curvature = problem()
    for bits in (0.5, 0.8, 1.2):
        found = solved(weight, factorize(gram, 0.001), factorize_rows([curvature]), bits)
        assert rate(found.codes) == pytest.approx(bits, rel=0.05)


def test_codes_are_those_of_gptq_on_the_same_grid():
    """One step for all: the column sweep of GPTQ on eight bits."""
    weight, gram, _ = problem()
    factor = factorize(gram)
    step = weight.abs().max() / 100
    grid = Grid(8, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfcompress.solvers.gptq.gptq_scales", lambda *_: (torch.full((ROWS, 1), step), None))
        expected = gptq(weight, factor, grid, torch.float32)
    codes = sweep_coded(
        weight,
        factor,
        indifferent(ROWS),
        torch.full((ROWS,), step),
        torch.ones(COLUMNS),
        Grid(8, type="coded", rate=3.0),
    )
    assert (codes == expected.codes).float().mean() > 0.999  # ties


def test_it_loses_half_of_what_a_fixed_grid_of_the_same_bytes_does():
    weight, gram, _ = problem()
    factor = factorize(gram)
    for bits in (2, 3):
        fixed = gptq(weight, factor, Grid(bits, 64), torch.bfloat16)
        found = solved(weight, factor, indifferent(ROWS), bits + 16 / 64)
        assert loss(weight, found, gram) < 0.5 * loss(weight, fixed, gram)


def test_no_other_steps_lose_less():
    """Steps of the columns or rows that are all the same, or that go too far, lose more at the same rate."""
    weight, gram, curvature = problem()
    factor, rows = factorize(gram, 0.01), factorize_rows([curvature], 0.01)
    best = Steps.of(factor, rows)
    least = loss(weight, solved(weight, factor, rows, 3.0), gram, curvature)
    for share in (0.0, 0.5, 1.5):
        moved = [Steps(best.rows**share, best.columns, 0.0), Steps(best.rows, best.columns**share, 0.0)]
        for steps in moved:
            snapped = Steps(powers(exponents(steps.rows)), powers(exponents(steps.columns)), 0.0)
            assert loss(weight, solved(weight, factor, rows, 3.0, snapped), gram, curvature) > least


def test_the_rate_without_a_sweep_is_near_and_its_curve_falls():
    weight, gram, _ = problem()
    factor, rows = factorize(gram), indifferent(ROWS)
    steps = Steps.of(factor, rows)
    unswept = Unswept(weight, steps)
    curve = unswept.curve()
    assert (curve.rates.diff() <= 1e-3).all()
    place = unswept.step(3.0)
    assert unswept.rate(place) == pytest.approx(3.0, abs=0.01)
    assert curve.at(place - steps.least) == pytest.approx(3.0, abs=0.03)
    part = Unswept(weight, steps, enough=weight.numel() // 4)
    assert part.rate(place) == pytest.approx(3.0, abs=0.2)


def test_too_few_bits_for_anything_leave_zeros():
    weight, gram, _ = problem()
    found = solved(weight, factorize(gram), indifferent(ROWS), 0.001)
    assert not found.codes.any()
    assert torch.isfinite(found.dequantize()).all()


def test_many_bits_lose_less_still_though_a_code_is_one_byte():
    """Rows of very different size, whose steps are all alike: those whose codes would not fit have coarser ones."""
    weight, gram, _ = problem()
    weight = weight * torch.logspace(-0.6, 0.6, ROWS)[:, None]
    factor, rows = factorize(gram), indifferent(ROWS)
    losses = []
    for bits in (3.0, 4.0, 5.0, 6.0):
        found = solved(weight, factor, rows, bits)
        assert found.codes.abs().max() < 127
        assert rate(found.codes) == pytest.approx(bits, rel=0.01)
        losses.append(loss(weight, found, gram))
        assert torch.equal(Native().unpack(Native().pack(found), found.grid).dequantize(), Native().values(found))
    assert all(fine < 0.7 * coarse for coarse, fine in itertools.pairwise(losses))
