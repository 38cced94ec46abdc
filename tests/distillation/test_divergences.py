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
"""Divergences: what their definitions say in float64, in value and gradient; alike where student and teacher nearly are."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfcompress.distillation.divergences import MIXED, Divergence


KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")


def defined(kind: str, b: float, temperature: float, teacher, student):
    """The definition, atom by atom, of distributions in float64."""
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (teacher, student))

    def kl(first, second):
        return sum(first[..., v] * torch.log(first[..., v] / second[..., v]) for v in range(first.shape[-1]))

    m = b * p + (1 - b) * q
    reversed_m = b * q + (1 - b) * p
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: (b * kl(p, m) + (1 - b) * kl(q, m)) / (b * (1 - b)),
        "skew_forward_kl": lambda: kl(p, m) / (1 - b) ** 2,
        "skew_reverse_kl": lambda: kl(q, reversed_m) / (1 - b) ** 2,
        "total_variation": lambda: sum((p[..., v] - q[..., v]).abs() for v in range(p.shape[-1])) / 2,
    }[kind]()
    return value * (temperature if kind == "total_variation" else temperature**2)


def logits(seed: int, scale: float, positions: int = 4, vocabulary: int = 9):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(positions, vocabulary, generator=generator) for _ in range(2)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([0.1, 0.5, 0.8]),
    st.sampled_from([0.5, 1.0, 4.0]),
    st.sampled_from([0.1, 1.0, 8.0]),
    st.integers(0, 1000),
)
@example("reverse_kl", 0.5, 0.5, 8.0, 137)
def test_values_and_gradients_are_those_of_the_definition(kind, mix, temperature, scale, seed):
    teacher, student = logits(seed, scale)
    ours = student.clone().requires_grad_()
    found = Divergence(kind, mix, temperature)(teacher, ours)
    assert found.dtype == torch.float32
    assert found.shape == (4,)
    found.sum().backward()
    exact = student.double().requires_grad_()
    expected = defined(kind, mix, temperature, teacher, exact)
    expected.sum().backward()
    lost = 1e-6 * temperature**2 / min(mix, 1 - mix) ** 2  # by float32, where nearly equal numbers are subtracted
    lost += 2e-7 * max(1.0, temperature) * max(teacher.abs().max().item(), student.abs().max().item())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=lost)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=lost)
    assert (found > -lost).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_are_no_distance_apart(kind):
    teacher, _ = logits(0, 3.0)
    torch.testing.assert_close(Divergence(kind)(teacher, teacher + 5.0), torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "total_variation"])
def test_all_agree_where_the_student_is_near(kind, temperature):
    """So a learning rate means the same for all of them."""
    teacher, direction = (each.double() for each in logits(3, 1.0))
    student = teacher + 1e-4 * direction
    p = torch.softmax(teacher / temperature, -1)
    step = 1e-4 * direction
    fisher = ((p * step.square()).sum(-1) - (p * step).sum(-1).square()) / 2
    for mix in (0.05, 0.5, 0.95) if kind in MIXED else (None,):
        found = Divergence(kind, mix, temperature)(teacher, student)
        torch.testing.assert_close(found, fisher, rtol=2e-3, atol=0)


def test_the_generalized_jsd_goes_over_into_both_kls():
    teacher, student = (each.double() for each in logits(1, 2.0))
    for mix, kind in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):
        near = Divergence("jsd", mix)(teacher, student)
        torch.testing.assert_close(near, Divergence(kind)(teacher, student), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_any_mass_do_no_harm(kind):
    """As the padding of a vocabulary has none."""
    teacher, student = logits(2, 2.0)
    without = Divergence(kind)(teacher, student)
    padding = torch.full((4, 3), -torch.inf)
    ours = torch.cat([student, padding], 1).requires_grad_()
    found = Divergence(kind)(torch.cat([teacher, padding], 1), ours)
    torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert torch.isfinite(ours.grad).all()
    assert (ours.grad[:, 9:] == 0).all()


def test_mixtures_have_a_share_of_their_own():
    assert [Divergence(kind).share for kind in MIXED] == [0.5, 0.1, 0.1]
    assert Divergence("jsd", 0.2).share == 0.2
