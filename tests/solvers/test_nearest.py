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
"""The compiled inner loops give what plain tensor operations do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.passes.solving import quadratic_trace
from hfcompress.solvers import gptq
from hfcompress.solvers.gptq import factorize, sweep
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.scales import choose_scales, plain_rounding_error, rounding_error


def problem(rows: int, columns: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) * (0.1 + torch.rand(columns, generator=generator))
    return weight, inputs.T @ inputs / len(inputs)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 600),
    columns=st.sampled_from([32, 96, 160, 320]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_compiled_sweep_gives_the_codes_of_the_plain_one(rows, columns, bits, symmetric, seed):
    weight, gram = problem(rows, columns, seed)
    grid = Grid(bits, 32, symmetric)
    factor = factorize(gram)
    scales, zeros = choose_scales(weight, factor.importance, grid, torch.float32)
    group = (factor.order // 32).tolist()
    arguments = (
        weight.T[factor.order],
        factor.feedback,
        scales.float().T.contiguous(),
        None if zeros is None else zeros.float().T.contiguous(),
        group,
        grid,
    )
    compiled = sweep(*arguments)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gptq, "_sweep_compiled", gptq._sweep_columns)
        plain = sweep(*arguments)
    assert compiled.dtype == plain.dtype == torch.int8
    assert (compiled == plain).float().mean() > 0.995  # sums in another order can tip what lies on an edge


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_compiled_cost_is_the_plain_one(rows, groups, bits, symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, groups, 64, generator=generator)
    importance = torch.rand(groups, 64, generator=generator)
    scales = torch.randn(rows, groups, generator=generator)  # of either sign
    zeros = (
        torch.zeros(rows, groups) if symmetric else torch.randint(-2, 2, (rows, groups), generator=generator).float()
    )
    grid = Grid(bits, 64, symmetric)
    found = rounding_error(values, importance, scales, zeros, grid)
    wanted = plain_rounding_error(values.double(), importance.double(), scales.double(), zeros.double(), grid)
    same = (found - wanted).abs() <= 1e-4 * wanted + 1e-6
    assert same.float().mean() > 0.95  # at an edge a value goes the other way in float64
    torch.testing.assert_close(
        found, plain_rounding_error(values, importance, scales, zeros, grid), rtol=1e-4, atol=1e-6
    )


def test_a_cost_that_overflows_is_infinite():
    values, scales = torch.full((1, 1, 32), 1e30), torch.full((1, 1), 1e-3)
    found = rounding_error(values, torch.ones(1, 32), scales, torch.zeros(1, 1), Grid(4, 32))
    assert found.isinf().all()


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 50), columns=st.integers(1, 700), seed=st.integers(0, 1000))
def test_the_trace_is_that_of_the_definition(rows, columns, seed):
    weight, gram = problem(rows, columns, seed)
    wanted = (weight.double() @ gram.double() @ weight.double().T).trace()
    assert quadratic_trace(weight, gram).item() == pytest.approx(wanted.item(), rel=1e-4)
