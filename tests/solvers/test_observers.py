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
"""Observers of ranges, against sorting and trying in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.solvers.grid import Grid
from hfcompress.solvers.observers import OBSERVERS, Histogram, minmax, mse, percentile, scale_of, static_scale


INT, FLOAT = Grid(8), Grid(8, type="float")
both_types = pytest.mark.parametrize("grid", [INT, FLOAT], ids=["int", "float"])


def make_values(seed=0, count=20_000, dtype=torch.float32, tail=3.0):
    """Values with a heavy tail, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    return (values * torch.exp(tail * torch.rand(count, generator=generator) ** 4)).to(dtype)


def squared_error(values, range_, grid):
    """What rounding to the codes costs, in float64 and value by value."""
    step = 2 * range_ / (grid.q_max - grid.q_min)
    scaled = values.double().abs() / step
    if grid.type == "int":
        codes = scaled.round().clamp(max=127)
    else:
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        table = table[table.isfinite() & (table >= 0)].unique()
        upper = torch.searchsorted(table, scaled.clamp(max=448)).clamp(max=len(table) - 1)
        lower = (upper - 1).clamp(min=0)
        codes = torch.where(scaled - table[lower] < table[upper] - scaled, table[lower], table[upper])
    return (codes * step - values.double().abs()).square().sum()


def test_every_magnitude_of_bfloat16_is_counted_by_itself():
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0078125, 3e38, 1e-40, -2.5], dtype=torch.bfloat16)
    found, counts = Histogram.empty().add(values).magnitudes()
    expected, times = values.abs().double().unique(return_counts=True)
    assert torch.equal(found, expected)
    assert counts.tolist() == times.tolist()


def test_the_largest_is_exact_whatever_the_bins():
    values = make_values()
    assert minmax(Histogram.empty().add(values), INT).item() == values.abs().max().item()
    assert static_scale(Histogram.empty().add(values), INT, "minmax", torch.float32).item() == pytest.approx(
        values.abs().max().item() / 127.5, rel=1e-7
    )


@pytest.mark.parametrize("value", [float("nan"), float("-nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_largest(value):
    assert not Histogram.empty().add(torch.tensor([1.0, value])).largest.isfinite()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 500), max_size=5))
def test_parts_in_any_order_and_their_sum_are_the_whole(seed, cuts):
    values = make_values(seed, 500)
    whole = Histogram.empty().add(values)
    edges = [0, *sorted(cuts), 500]
    parts = [values[a:b] for a, b in itertools.pairwise(edges)]
    streamed, summed = Histogram.empty(), Histogram.empty()
    for part in reversed(parts):
        streamed = streamed.add(part)
        summed = summed + Histogram.empty().add(part.view(-1, 1))
    for other in (streamed, summed):
        assert torch.equal(other.counts, whole.counts)
        assert torch.equal(other.largest, whole.largest)
    assert whole.counts.sum() == 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.5, 0.99, 0.999, 1.0])
def test_the_percentile_is_the_sorted_one(dtype, share):
    values = make_values(dtype=dtype)
    found = percentile(Histogram.empty().add(values), INT, share).item()
    expected = np.quantile(values.abs().double().numpy(), share, method="inverted_cdf")
    assert found == pytest.approx(expected, rel=0 if dtype == torch.bfloat16 else 2**-8, abs=0)


def test_a_percentile_of_zero_is_no_range():
    """After a ReLU nearly all may be zero; the rest must not be lost."""
    values = torch.zeros(100_000)
    values[0] = 5.0
    assert percentile(Histogram.empty().add(values), INT).item() == 5.0


@both_types
@pytest.mark.parametrize("tail", [0.0, 3.0, 6.0])
def test_the_mse_range_is_the_best_of_a_dense_scan(grid, tail):
    values = make_values(seed=4, count=5_000, tail=tail)
    found = mse(Histogram.empty().add(values), grid)
    tried = values.abs().max().double() * torch.linspace(0.1, 1, 400, dtype=torch.float64)
    best = min(squared_error(values, range_, grid) for range_ in tried)
    assert squared_error(values, found, grid) <= 1.02 * best
    assert squared_error(values, found, grid) <= squared_error(values, values.abs().max().double(), grid) * 1.001


def test_clipping_pays_on_integers_under_a_heavy_tail():
    """So that the test above can fail: the full range is much worse."""
    values = make_values(seed=4, count=100_000, tail=0.0)
    values[0] = 12.0
    full = squared_error(values, values.abs().max().double(), INT)
    assert squared_error(values, mse(Histogram.empty().add(values), INT), INT) < 0.9 * full


@both_types
def test_the_scale_puts_the_range_on_the_outermost_code(grid):
    assert scale_of(torch.tensor(51.0, dtype=torch.float64), grid).item() == 51 / (127.5 if grid is INT else 448)


@both_types
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stored_scale_is_one_positive_number_in_its_dtype(grid, observer, dtype):
    for values in (make_values(count=300), torch.zeros(7), torch.full((5,), 1e-38)):
        scale = static_scale(Histogram.empty().add(values), grid, observer, dtype)
        assert scale.shape == (1,)
        assert scale.dtype == dtype
        assert scale > 0
    assert static_scale(Histogram.empty(), grid, observer, dtype).item() == 1
