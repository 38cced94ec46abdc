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
"""Rotations: orthogonal at every width, the same at every run, and the same as the plain matrix product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.solvers.rotation import paley, random_rotation, sylvester


@pytest.mark.parametrize("order", [1, 2, 4, 64])
def test_sylvester_is_a_hadamard_matrix(order):
    matrix = sylvester(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [12, 20, 24, 28, 36, 44, 60, 76, 84, 108])
def test_paley_is_a_hadamard_matrix(order):
    matrix = paley(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [6, 7, 52, 92, 100, 116, 1024])
def test_paley_says_where_it_gives_none(order):
    assert paley(order) is None


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_every_width_has_an_orthogonal_matrix(size, seed):
    rotation = random_rotation(size, seed)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(matrix, random_rotation(size, seed).matrix())


@settings(max_examples=25, deadline=None)
@given(size=st.sampled_from([1, 7, 12, 64, 96, 160, 130]), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_it_is_the_product_with_its_kronecker_factors(size, rows, seed):
    rotation = random_rotation(size, seed)
    x = torch.randn(2, rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in rotation.factors:
        matrix = torch.kron(matrix, factor.contiguous())
    expected = x @ (torch.diag(rotation.signs) @ matrix)
    torch.testing.assert_close(rotation.apply(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [64, 96, 576, 896, 1536, 2304, 2560, 3072, 3584, 4096, 5120, 8192])
def test_the_widths_of_real_models_are_spread_evenly(size):
    """One large entry ends up as entries of the same magnitude everywhere: the rotation is a Hadamard matrix."""
    one = torch.zeros(1, size)
    one[0, size // 3] = 1
    turned = random_rotation(size, 0).apply(one)
    torch.testing.assert_close(turned.abs(), torch.full_like(turned, size**-0.5), rtol=0, atol=1e-12)


def test_another_seed_is_another_rotation():
    assert not torch.equal(random_rotation(64, 0).matrix(), random_rotation(64, 1).matrix())
