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
"""What a cache keeps of a teacher: exact where it keeps all, never too much otherwise, and right on average."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.distillation.divergences import Divergence
from hfcompress.distillation.signals import Drawn, Largest, Live


KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")


def logits(seed: int, positions: int = 6, vocabulary: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(positions, vocabulary, dtype=torch.float64, generator=generator)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1000), size=st.integers(1, 19))
@settings(max_examples=20, deadline=None)
def test_the_largest_are_never_farther_than_all(kind, seed, size):
    theirs, ours = logits(seed), logits(seed + 1)
    exact = Divergence(kind)(theirs, ours)
    found = Largest()(Largest.of(theirs, size, generator()), ours, Divergence(kind))
    assert (found <= exact * (1 + 1e-5) + 1e-5).all()
    assert (found >= -1e-5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_whole_vocabulary_nothing_is_lost(kind):
    theirs, ours = logits(0), logits(1).requires_grad_()
    exact = Divergence(kind)(theirs, ours)
    [wanted] = torch.autograd.grad(exact.sum(), ours)
    found = Largest()(Largest.of(theirs, 50, generator()), ours, Divergence(kind))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    [given_] = torch.autograd.grad(found.sum(), ours)
    torch.testing.assert_close(given_, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_drawn_has_the_right_mean_and_so_has_its_gradient():
    theirs, ours = logits(0, 2, 8) / 3, (logits(1, 2, 8) / 3).requires_grad_()
    exact = Divergence()(theirs, ours)
    [wanted] = torch.autograd.grad(exact.sum(), ours)
    found = Drawn()(Drawn.of(theirs, 200_000, generator()), ours, Divergence())
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.01)
    [given_] = torch.autograd.grad(found.sum(), ours)
    torch.testing.assert_close(given_, wanted, rtol=0, atol=0.01)


def test_few_draws_are_right_on_average_where_the_largest_are_not():
    theirs, ours = (logits(0, 1, 30) / 4).expand(20_000, -1), (logits(1, 1, 30) / 4).expand(20_000, -1)
    exact = Divergence()(theirs[:1], ours[:1]).item()
    drawn = Drawn()(Drawn.of(theirs, 4, generator()), ours, Divergence()).mean().item()
    largest = Largest()(Largest.of(theirs[:1], 4, generator()), ours[:1], Divergence()).item()
    assert drawn == pytest.approx(exact, rel=0.05)
    assert largest < 0.9 * exact


def test_ids_that_the_student_does_not_know_are_among_the_rest():
    theirs, ours = logits(0), logits(1)[:, :12]
    kept = Largest.of(theirs, 20, generator())
    found = Largest()(kept, ours, Divergence())
    assert found.isfinite().all()
    assert Live(lambda hidden: hidden, 12)({"hidden": theirs}, ours, Divergence()).isfinite().all()
