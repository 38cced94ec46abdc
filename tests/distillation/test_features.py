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
"""Hidden states compared: what the definitions say, however a step is divided, with gradients where they should be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.distillation.divergences import Divergence
from hfcompress.distillation.features import Features, default_map
from hfcompress.distillation.objective import Balance, Objective


KINDS = ("mse", "cosine", "relation", "contrastive", "adversarial")
ROWS, LENGTH, WIDTH = 3, 7, 5


def states(width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, LENGTH, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ragged() -> torch.Tensor:
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 4, 1])[:, None]
    mask[1, 0] = False  # padded on the left
    return mask


def cosine(a, b) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def slowly(kind: str, ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor) -> float:
    """The definitions, one position at a time."""
    judge = features("adversarial").judges[0]
    total = 0.0
    for row in range(ROWS):
        valid = [position for position in range(LENGTH) if mask[row, position]]
        for i in valid:
            s, t = ours[row, i], theirs[row, i]
            if kind == "adversarial":
                probabilities = [judge(h / h.square().mean().sqrt()).sigmoid().item() for h in (s, t)]
                total -= math.log(1 - probabilities[0]) + math.log(probabilities[1])
            elif kind == "mse":
                total += ((s - t).square().sum() / t.square().sum()).item()
            elif kind == "cosine":
                total += 1 - cosine(s, t)
            elif kind == "contrastive":
                scores = {j: math.exp(10 * cosine(s, theirs[row, j])) for j in valid}
                total -= math.log(scores[i] / sum(scores.values()))
            elif before := [j for j in valid if j < i]:
                p, q = ([math.exp(10 * cosine(h[row, i], h[row, j])) for j in before] for h in (theirs, ours))
                total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return total


def features(kind, width=WIDTH, teacher_width=WIDTH) -> Features:
    return Features(kind, {0: 0}, width, teacher_width, seed=0, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_definition_says(kind):
    ours, theirs, mask = states(seed=1), states(seed=2), ragged()
    found = features(kind)([ours], [theirs], mask)
    assert found.item() == pytest.approx(slowly(kind, ours, theirs, mask), rel=1e-9)
    assert found.item() > 0


@pytest.mark.parametrize("kind", KINDS)
@given(split=st.integers(1, ROWS - 1), seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_parts_of_a_batch_add_up(kind, split, seed):
    ours, theirs, mask = states(seed=seed), states(seed=seed + 1), ragged()
    compared = features(kind)
    parts = [compared([ours[part]], [theirs[part]], mask[part]) for part in (slice(split), slice(split, None))]
    assert sum(p.item() for p in parts) == pytest.approx(compared([ours], [theirs], mask).item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_reach_no_padding(kind):
    ours, theirs, mask = states(seed=1).requires_grad_(), states(seed=2), ragged()
    features(kind)([ours], [theirs], mask).backward()
    assert ours.grad.isfinite().all()
    assert not ours.grad[~mask].any()
    assert ours.grad[0].any()


@pytest.mark.parametrize("kind", ["mse", "cosine", "relation"])
def test_the_teacher_itself_costs_nothing(kind):
    assert features(kind)([states()], [states()], ragged()).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_another_width_is_mapped_where_that_is_needed(kind):
    compared = features(kind, 3, WIDTH)
    assert len(compared.maps) == (0 if kind == "relation" else 1)
    loss = compared([states(3, 1)], [states(seed=2)], ragged())
    loss.backward() if len(compared.maps) else None
    assert all(parameter.grad.any() for parameter in compared.parameters())


def test_what_the_judge_learns_the_student_unlearns():
    """Its gradient has the sign that makes them harder to tell apart, the judge's the other; and then they are."""
    ours, theirs, mask = states(seed=1).requires_grad_(), states(seed=2), ragged()
    compared = features("adversarial")
    loss = compared([ours], [theirs], mask)
    loss.backward()
    with torch.no_grad():
        worse = compared([ours - 1e-4 * ours.grad], [theirs], mask)
        for parameter in compared.parameters():
            parameter -= 1e-4 * parameter.grad
        better = compared([ours], [theirs], mask)
    assert better < loss < worse
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(1, 512, WIDTH, dtype=torch.float64, generator=generator) + 2.0
    shift = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [shift], "lr": 0.03}, {"params": compared.parameters(), "lr": 0.01}])
    everywhere = torch.ones(1, 512, dtype=torch.bool)
    for _ in range(300):
        noise = torch.randn(1, 512, WIDTH, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        (compared([noise + shift], [theirs], everywhere) / 512).backward()
        optimizer.step()
    assert (shift - 2.0).abs().mean() < 0.6  # of 2 at the start


@pytest.mark.parametrize(
    ("student", "teacher", "kept", "expected"),
    [
        (8, 8, None, {1: 1, 3: 3, 5: 5, 7: 7}),
        (3, 6, None, {0: 1, 1: 3, 2: 5}),
        (4, 6, [0, 2, 3, 5], {0: 0, 1: 2, 2: 3, 3: 5}),
        (1, 4, None, {0: 3}),
    ],
)
def test_which_blocks_are_compared(student, teacher, kept, expected):
    assert default_map(student, teacher, kept) == expected


def test_the_temperature_goes_in_a_straight_line():
    aim = Objective(divergence=Divergence(temperature=4.0), final_temperature=1.0)
    assert [aim.divergence_at(done).temperature for done in (0.0, 0.5, 1.0)] == [4.0, 2.5, 1.0]
    assert Objective(divergence=Divergence(temperature=4.0)).divergence_at(0.5).temperature == 4.0


def test_the_balance_is_of_whole_steps():
    balance = Balance()
    assert balance.ratio == 1.0
    balance.add(0, 1.0, 4.0)
    balance.add(0, 2.0, 2.0)
    assert balance.ratio == 1.0  # the step is not whole yet
    balance.add(1, 13.0, 6.0)
    assert balance.ratio == 0.5
    balance.add(2, 0.0, 0.0)
    assert balance.ratio == pytest.approx((0.9 * 3 + 0.1 * 13) / 6)
