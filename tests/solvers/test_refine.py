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
"""Refinement of scales and codes: against the exact solution in float64, and against trying each code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gptq import make_problem
from test_two_sided import make_curvature, whole

from hfcompress.solvers.curvature import factorize_rows, indifferent
from hfcompress.solvers.gptq import factorize
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.refine import Rounded
from hfcompress.solvers.two_sided import gptq_two_sided


def make_rounded(
    seed=0, out_features=5, in_features=64, bits=2, group_size=32, symmetric=True, blocks=None, keep=None
):
    """A weight on random codes near it, in the orders of its factors."""
    weight, gram = make_problem(seed, out_features, in_features)
    factor = factorize(gram)
    curvature = make_curvature(out_features, seed)
    rows = factorize_rows([curvature], 0.1) if blocks is None else indifferent(out_features)
    grid = Grid(bits, group_size, symmetric)
    group = factor.order // group_size
    generator = torch.Generator().manual_seed(seed)
    scales = 0.5 + torch.rand(in_features // group_size, out_features, generator=generator)
    zeros = None if symmetric else torch.ones_like(scales)
    target = weight[rows.order].T[factor.order].contiguous()
    codes = grid.round(target, scales[group], None if zeros is None else zeros[group]).to(torch.int8)
    stays = torch.ones(0, 0, dtype=torch.bool) if keep is None else keep[rows.order].T[factor.order].contiguous()
    if keep is not None:
        codes = codes * stays
    return Rounded(target, factor.damped(gram), rows, codes, scales, zeros, group, grid, torch.float32, stays)


def loss(rounded: Rounded, codes=None, scales=None) -> torch.Tensor:
    """The objective in float64."""
    codes = rounded.codes.double() if codes is None else codes
    scales = rounded.scales.double() if scales is None else scales
    levels = codes if rounded.zeros is None else codes - rounded.zeros.double()[rounded.group]
    error = rounded.target.double() - levels * scales[rounded.group]
    rows, ordered = rounded.rows, torch.empty(0)
    ordered = whole(rows)[rows.order][:, rows.order]
    return ((rounded.gram.double() @ error @ ordered) * error).sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", [None, 1])
def test_refitted_scales_solve_the_linear_system(blocks, symmetric):
    rounded = make_rounded(symmetric=symmetric, blocks=blocks)
    scales = rounded.scales.double().requires_grad_()
    (slope,) = torch.autograd.grad(loss(rounded, scales=scales), scales, create_graph=True)
    system = torch.autograd.functional.hessian(lambda s: loss(rounded, scales=s), rounded.scales.double())
    size = rounded.scales.numel()
    exact = rounded.scales.double() - torch.linalg.solve(system.view(size, size), slope.detach().flatten()).view_as(
        scales
    )
    before = loss(rounded).item()
    rounded.refit_scales()
    best = loss(rounded, scales=exact).item()
    assert loss(rounded).item() - best < 0.02 * (before - best)  # a few steps of conjugate gradients
    assert rounded.loss == pytest.approx(loss(rounded).item(), rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", [None, 1])
def test_codes_descend_one_after_the_other(blocks, symmetric):
    """The compiled sweep moves the codes that the obvious loop moves."""
    rounded = make_rounded(in_features=160, symmetric=symmetric, blocks=blocks)
    codes, before = rounded.codes.double().clone(), loss(rounded).item()
    low, high = rounded.grid.q_min, rounded.grid.q_max
    for column in range(codes.shape[0]):
        for row in range(codes.shape[1]):
            tried = []
            for code in range(low, high + 1):
                codes[column, row] = code
                tried.append(loss(rounded, codes=codes).item())
            codes[column, row] = low + min(range(len(tried)), key=tried.__getitem__)
    rounded.descend_codes()
    assert loss(rounded).item() < before
    assert torch.equal(rounded.codes.double(), codes)


@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    symmetric=st.booleans(),
    rounds=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_no_round_makes_it_worse_and_codes_stay_on_the_grid(seed, bits, rows, groups, symmetric, rounds):
    rounded = make_rounded(seed, rows, 32 * groups, bits, 32, symmetric)
    before = loss(rounded).item()
    rounded.refine(rounds)
    assert loss(rounded).item() <= before * (1 + 1e-5)
    assert rounded.codes.min() >= rounded.grid.q_min
    assert rounded.codes.max() <= rounded.grid.q_max
    assert torch.isfinite(rounded.scales).all()
    assert (rounded.scales != 0).all()


@pytest.mark.parametrize("sizes", [(5, 2, 9), (1,) * 6], ids=["blocks", "rows"])
def test_blocks_do_not_mind_what_is_solved_beside_them(sizes):
    """So that several processes may each have some of them."""
    weight, gram = make_problem(3, sum(sizes), 96)
    factor, grid = factorize(gram), Grid(2, 32, symmetric=False)
    curvatures = [make_curvature(size, seed) for seed, size in enumerate(sizes)]

    def solved(rows, blocks):
        found = factorize_rows(blocks, 0.1) if max(sizes) > 1 else indifferent(len(rows))
        return gptq_two_sided(rows, rows, gram, factor, found, grid, torch.float32, True, rounds=4)

    whole = solved(weight, curvatures)
    start = 0
    for size, curvature in zip(sizes, curvatures, strict=True):
        alone = solved(weight[start : start + size], [curvature])
        assert torch.equal(whole.codes[start : start + size], alone.codes)
        torch.testing.assert_close(whole.scales[start : start + size], alone.scales, rtol=1e-4, atol=0)
        start += size


def test_scales_are_those_that_are_stored():
    rounded = make_rounded()
    rounded.dtype = torch.bfloat16
    rounded.refine(2)
    assert torch.equal(rounded.scales, rounded.scales.bfloat16().float())
