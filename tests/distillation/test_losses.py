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
"""The loss: what a slow float64 reference gives, chunked or not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.distillation.divergences import Divergence
from hfcompress.distillation.losses import distillation_loss
from hfcompress.distillation.signals import Live


def data(positions: int = 7, hidden: int = 5, vocabulary: int = 11, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(positions, hidden, generator=generator) for _ in range(2))
    heads = [torch.nn.Parameter(2 * torch.randn(vocabulary, hidden, generator=generator)) for _ in range(2)]
    return ours.requires_grad_(), theirs, torch.randint(vocabulary, (positions,), generator=generator), *heads


def whole(ours, theirs, targets, head, teacher, weight):
    """The definition, in float64."""
    p, q = (torch.log_softmax((h @ w.T).double(), -1) for h, w in ((theirs, teacher), (ours, head)))
    kl = sum((p[i].detach().exp() * (p[i].detach() - q[i])).sum() for i in range(len(ours)))
    return kl - weight * sum(q[i, targets[i]] for i in range(len(ours)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 10), st.sampled_from([0.0, 0.3]), st.booleans())
def test_loss_and_gradients_do_not_depend_on_the_chunks(positions, chunk, weight, head_learns):
    ours, theirs, targets, head, teacher = data(positions)
    head.requires_grad_(head_learns)
    loss = distillation_loss(
        ours,
        {"hidden": theirs},
        targets,
        lambda hidden: hidden @ head.T,
        Live(lambda hidden: hidden @ teacher.T),
        weight,
        chunk,
        [head] if head_learns else [],
    )
    (loss / 3).backward()
    found = loss.detach(), ours.grad.clone(), head.grad
    ours.grad = None
    head.grad = None
    expected = whole(ours, theirs, targets, head, teacher, weight)
    (expected / 3).backward()
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert torch.allclose(found[1], ours.grad, rtol=1e-4, atol=1e-6)
    assert teacher.grad is None
    if head_learns:
        assert torch.allclose(found[2], head.grad, rtol=1e-4, atol=1e-5)
    else:
        assert found[2] is None


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_other_divergences_do_not_depend_on_the_chunks_either(chunk):
    found = []
    for size in (7, chunk):
        ours, theirs, targets, head, teacher = data()
        heads = (lambda hidden, w=head: hidden @ w.T, Live(lambda hidden, w=teacher: hidden @ w.T))
        jsd = Divergence("jsd", 0.3, 2.0)
        loss = distillation_loss(ours, {"hidden": theirs}, targets, *heads, 0.1, size, [head], jsd)
        loss.backward()
        found.append((loss.detach(), ours.grad, head.grad))
    for whole_, chunked in zip(*found, strict=True):
        torch.testing.assert_close(whole_, chunked, rtol=1e-4, atol=1e-5)


def test_no_gradient_is_made_where_none_is_wanted():
    ours, theirs, targets, head, teacher = data()
    with torch.no_grad():
        signal = Live(lambda hidden: hidden @ teacher.T)
        loss = distillation_loss(ours, {"hidden": theirs}, targets, lambda hidden: hidden @ head.T, signal, chunk=2)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(whole(ours, theirs, targets, head, teacher, 0).item(), rel=1e-5)
