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
"""The shifted target: against least squares in float64."""

import pytest
import torch

from hfcompress.solvers.gptq import factorize
from hfcompress.solvers.shift import LARGEST, capped, shift_strength, target_shift


def make_streams(tokens=400, columns=48, rows=10, seed=0):
    """A weight, what its inputs are now, and what the dense model's were."""
    generator = torch.Generator().manual_seed(seed)
    mixing, weight = (torch.randn(n, columns, generator=generator) for n in (columns, rows))
    dense = torch.randn(tokens, columns, generator=generator) @ mixing
    inputs = dense + 0.3 * columns**0.5 * torch.randn(tokens, columns, generator=generator)
    return weight, inputs, dense


@pytest.mark.parametrize("act_order", [True, False])
def test_the_shifted_weight_is_the_ridge_solution(act_order):
    weight, x, dense = make_streams()
    gram, cross = x.T @ x / len(x), (dense - x).T @ x / len(x)
    shift = target_shift(weight, cross, factorize(gram, 0.01, act_order))
    damped = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(len(gram))
    # min ||V X - W X_f||^2 + damping ||V - W||^2
    right = weight.double() @ (dense.double().T @ x.double() / len(x) + damped - gram.double())
    expected = torch.linalg.solve(damped, right.T).T - weight.double()
    torch.testing.assert_close(shift.double(), expected, rtol=2e-3, atol=2e-4)


def test_it_brings_the_outputs_nearer_to_the_dense_models():
    weight, x, dense = make_streams()
    shift = target_shift(weight, (dense - x).T @ x / len(x), factorize(x.T @ x / len(x)))
    _, fresh, fresh_dense = make_streams(seed=0, tokens=800)
    before = (fresh @ weight.T - fresh_dense @ weight.T).square().sum()
    after = (fresh @ (weight + shift).T - fresh_dense @ weight.T).square().sum()
    assert after < 0.95 * before


def test_the_strength_is_the_best_on_the_held_out_tokens():
    weight, x, dense = make_streams(tokens=150)
    fit, held = slice(0, 100), slice(100, 150)
    shift = target_shift(weight, (dense - x)[fit].T @ x[fit] / 100, factorize(x[fit].T @ x[fit] / 100))
    gram, cross = x[held].T @ x[held] / 50, (dense - x)[held].T @ x[held] / 50
    found = shift_strength(weight, shift, gram, cross)
    wanted = dense[held].double() @ weight.double().T
    tried = torch.linspace(0, 1, 201, dtype=torch.float64)
    errors = [(x[held].double() @ (weight + a * shift).double().T - wanted).square().sum() for a in tried]
    assert 0 < found < 1
    assert found == pytest.approx(tried[int(torch.stack(errors).argmin())].item(), abs=0.006)


def test_a_correction_that_hurts_is_not_taken():
    weight, x, dense = make_streams()
    gram, cross = x.T @ x / len(x), (dense - x).T @ x / len(x)
    shift = target_shift(weight, cross, factorize(gram))
    assert shift_strength(weight, -shift, gram, cross) == 0
    assert shift_strength(weight, torch.zeros_like(shift), gram, cross) == 0
    assert shift_strength(weight, 0.1 * shift, gram, cross, most=0.5) == 0.5


def test_a_correction_is_no_longer_than_a_fifth_of_the_weight():
    weight = torch.ones(2, 3)
    assert capped(weight, weight).norm() == pytest.approx((LARGEST * weight.norm()).item())
    small = 0.1 * weight
    assert capped(small, weight) is small
