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

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.passes.solving import quadratic_trace
from hfcompress.solvers import gptq
from hfcompress.solvers.gptq import factorize, sweep
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.scales import choose_scales, plain_rounding_error, rounding_error


triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")


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
        patched.setattr(gptq, "_inner_loop", lambda device, grid: (gptq._sweep_columns, gptq.SUB_BLOCK))
        plain = sweep(*arguments)
    assert compiled.dtype == plain.dtype == torch.int8
    assert (compiled == plain).float().mean() > 0.995  # sums in another order can tip what lies on an edge


# in a process of its own: Triton reads the setting once
ON_CUDA = """
import sys

import torch

from hfcompress.solvers import gptq
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.scales import choose_scales

for rows, columns, bits, symmetric in [(40, 96, 4, True), (33, 160, 2, False), (70, 272, 3, False), (1, 16, 8, True)]:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    factor, grid = gptq.factorize(inputs.T @ inputs / len(inputs)), Grid(bits, 16, symmetric)
    scales, zeros = choose_scales(weight, factor.importance, grid, torch.float32)
    scales, zeros = (None if each is None else each.float().T.contiguous() for each in (scales, zeros))
    arguments = weight.T[factor.order], factor.feedback, scales, zeros, (factor.order // 16).tolist(), grid
    found = []
    for loop in ((gptq._sweep_columns, gptq.SUB_BLOCK), (gptq._sweep_on_cuda, gptq.BLOCK)):
        gptq._inner_loop = lambda device, grid, loop=loop: loop
        found.append(gptq.sweep(*arguments))
    assert len(found[0].unique()) > 2
    print((found[0] == found[1]).float().mean().item())
"""


@triton
def test_the_sweep_for_cuda_gives_the_codes_of_the_plain_one():
    """By Triton's interpreter, on a CPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", ON_CUDA], env=environment, capture_output=True, text=True, check=True)
    same = [float(line) for line in done.stdout.split()]
    assert len(same) == 4
    assert min(same) > 0.995


@triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_the_sweep_for_cuda_compiles_and_keeps_its_tile_in_registers(capability, has_zeros):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hfcompress.kernels.nearest_cuda import ROWS, _sweep

    kinds = {"group": "*i64", "codes": "*i8", "columns": "i32", "rows": "i32", "feedback_stride": "i32"}
    kinds |= {"low": "fp32", "high": "fp32"}
    constants = {"HAS_ZEROS": has_zeros, "COLUMNS": gptq.BLOCK, "ROWS": ROWS}
    signature = {name: kinds.get(name, "*fp32") for name in _sweep.arg_names}
    source = ASTSource(_sweep, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    made = compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "enable_fp_fusion": False}
    )
    assert made.asm["cubin"]
    assert "div.rn.f32" in made.asm["ptx"]
    assert "st.local" not in made.asm["ptx"]


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
