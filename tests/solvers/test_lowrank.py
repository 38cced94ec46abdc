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
"""Low rank: against a dense singular value decomposition, the proximal map of the nuclear norm, every choice of ranks."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.solvers.curvature import DAMPING
from hfcompress.solvers.lowrank import FLOOR, rank_at, ranks_within, spectrum, worth_factoring


SHAPES = [(40, 56), (56, 40), (48, 48)]


def problem(rows: int, columns: int, seed: int = 0):
    """A weight, a Gram matrix, and what outputs are worth, in blocks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = normal(400, 12) @ normal(12, columns) + 0.3 * normal(400, columns)
    gradients = normal(400, 6) @ normal(6, rows) + 0.3 * normal(400, rows)
    half = rows // 2
    blocks = [gradients[:, :half].T @ gradients[:, :half] / 400, gradients[:, half:].T @ gradients[:, half:] / 400]
    return normal(rows, columns), inputs.T @ inputs / 400, blocks


def damped(blocks):
    """`C` as it is factored, float64."""
    whole = torch.block_diag(
        *(block.double() + DAMPING * block.double().diagonal().mean() * torch.eye(len(block)) for block in blocks)
    )
    return whole


def loss(error, gram, curvature) -> float:
    return ((curvature @ error @ gram.double()) * error).sum().item()


def reference(weight, gram, curvature):
    """The weight between square roots of both, decomposed."""
    left, right = torch.linalg.cholesky(curvature), torch.linalg.cholesky(gram.double())
    u, s, vt = torch.linalg.svd(left.T @ weight.double() @ right, full_matrices=False)
    return left, right, u, s, vt


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighed", [True, False])
def test_every_rank_is_the_best_there_is_and_loses_what_is_said(shape, weighed):
    weight, gram, blocks = problem(*shape)
    curvature = damped(blocks) if weighed else torch.eye(shape[0], dtype=torch.float64)
    found = spectrum(weight, gram, blocks if weighed else None)
    _, _, _, singular, _ = reference(weight, gram, curvature)
    torch.testing.assert_close(found.values, singular.square(), rtol=1e-6, atol=1e-6 * singular[0].item() ** 2)
    for rank in (1, 7, 20, min(shape)):
        left, right = found.truncated(rank)
        assert left.shape == (shape[0], rank)
        assert right.shape == (rank, shape[1])
        lost = loss(weight.double() - left.double() @ right.double(), gram, curvature)
        best = singular[rank:].square().sum().item()
        assert lost == pytest.approx(best, rel=1e-4, abs=1e-6 * singular.square().sum().item())
        assert found.lost()[rank].item() == pytest.approx(best, rel=1e-5, abs=1e-8 * singular.square().sum().item())
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_shrinkage_is_the_proximal_map_of_the_nuclear_norm(shape):
    """Soft thresholds of the singular values, at the largest that is left out."""
    weight, gram, blocks = problem(*shape)
    left, right, u, s, vt = reference(weight, gram, damped(blocks))
    rank = 9
    soft = u @ torch.diag((s - s[rank]).clamp(min=0)) @ vt
    expected = torch.linalg.solve_triangular(left.T, soft, upper=True)
    expected = torch.linalg.solve_triangular(right, expected, upper=False, left=False)
    a, b = spectrum(weight, gram, blocks).truncated(rank, 1.0)
    torch.testing.assert_close((a.double() @ b.double()), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_of_few_directions_is_kept_whole():
    weight, gram, blocks = problem(40, 56)
    thin = weight[:, :5] @ weight[:5]
    left, right = spectrum(thin, gram, blocks).truncated(16)
    torch.testing.assert_close(left @ right, thin, rtol=1e-3, atol=1e-3)
    nothing = spectrum(torch.zeros(40, 56), gram).truncated(8)
    assert torch.equal(nothing[0] @ nothing[1], torch.zeros(40, 56))


def test_inputs_that_decide_nothing_are_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        spectrum(torch.ones(8, 4), -torch.eye(4))


falls = st.lists(st.floats(0.01, 10), min_size=16, max_size=16).map(lambda values: sorted(values, reverse=True))


@settings(max_examples=40)
@given(st.lists(falls, min_size=1, max_size=3), st.floats(0.3, 0.95))
def test_ranks_lose_as_little_as_any_at_that_price(spectra, ratio):
    """Against all choices: none that takes no more loses less."""
    lost, shapes = {}, {}
    for number, values in enumerate(spectra):
        tail = torch.tensor(values, dtype=torch.float64).flip(0).cumsum(0).flip(0)
        lost[str(number)], shapes[str(number)] = torch.cat([tail, tail.new_zeros(1)]), (16, 16 * (number + 1))
    found = ranks_within(lost, shapes, ratio, 2)

    def paid(ranks):
        return sum(r * c if k is None else k * (r + c) for k, (r, c) in zip(ranks, shapes.values(), strict=True))

    def total(ranks):
        return sum(0.0 if k is None else lost[n][k].item() for k, n in zip(ranks, shapes, strict=True))

    own = list(found.values())
    budget = ratio * sum(r * c for r, c in shapes.values())
    least = [rank_at(FLOOR * ratio, shape, 2) for shape in shapes.values()]
    assert paid(own) <= budget or own == least
    ranks = [
        [*(k for k in range(low, 16, 2) if worth_factoring(k, s)), None]
        for low, s in zip(least, shapes.values(), strict=True)
    ]
    for other in itertools.product(*ranks):
        assert paid(other) > paid(own) or total(other) >= total(own) - 1e-9


def test_a_rank_is_a_multiple_and_pays():
    assert rank_at(0.8, (256, 256), 8) == 96
    assert rank_at(0.01, (256, 256), 8) == 8
    assert worth_factoring(127, (256, 256))
    assert not worth_factoring(128, (256, 256))
