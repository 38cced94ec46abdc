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
"""
How far a student's distribution is from its teacher's: six answers, all per position and in nats.

All but the total variation agree to second order where student and teacher nearly do: each is then half the Fisher form
of their difference, so that one learning rate serves them all (Gou et al.'s survey, arXiv 2006.05525, has the family;
where a definition carries another factor, its docstring says so). `temperature` divides the logits of both; times its
square, a gradient keeps its size (Hinton et al., arXiv 1503.02531, section 2).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


if TYPE_CHECKING:
    from torch import Tensor


Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]
MIXED = ("jsd", "skew_forward_kl", "skew_reverse_kl")
FLOOR = -1e5  # of a log-probability: padding of a vocabulary may have none, and infinities have no differences


@dataclass(frozen=True)
class Divergence:
    """
    Args:
        kind (`str`, *optional*, defaults to `"forward_kl"`): `p` the teacher, `q` the student, `m` a mixture of both:
            `"forward_kl"` is `KL(p || q)`, `"reverse_kl"` is `KL(q || p)`; `"jsd"` the generalized Jensen-Shannon
            divergence `(b KL(p || m) + (1 - b) KL(q || m)) / (b (1 - b))`, `m = b p + (1 - b) q` (arXiv 2306.13649,
            section 3, without that denominator, by which it goes over into the two KLs at both ends);
            `"skew_forward_kl"` is `KL(p || m) / (1 - b)^2`, and `"skew_reverse_kl"` is `KL(q || m) / (1 - b)^2` with
            `m = b q + (1 - b) p` (DistiLLM, arXiv 2402.03898, eq. 4 and 5, without the denominators);
            `"total_variation"` is `sum |p - q| / 2`.
        mix (`float`, *optional*): the `b` of the mixture, in (0, 1); 0.5 for `"jsd"` and 0.1 for the skew ones if left out.
        temperature (`float`, *optional*, defaults to 1.0): of both distributions.
    """

    kind: Kind = "forward_kl"
    mix: float | None = None
    temperature: float = 1.0

    def __call__(self, teacher_logits: "Tensor", student_logits: "Tensor") -> "Tensor":
        """
        Args:
            teacher_logits (`Tensor`): `(positions, vocabulary)`.
            student_logits (`Tensor`): likewise.

        Returns:
            `Tensor`: float32 `(positions,)`, or float64 of float64.
        """
        theirs, ours = (self._log_probabilities(logits) for logits in (teacher_logits, student_logits))
        return self.between(theirs, ours)

    def between(self, teacher: "Tensor", student: "Tensor") -> "Tensor":
        """The same of log-probabilities `(positions, outcomes)`, which have their temperature already."""
        theirs, ours = (each.clamp(min=FLOOR) for each in (teacher, student))
        return _KINDS[self.kind](theirs, ours, self.share) * self._factor

    @property
    def share(self) -> float:
        """`b`."""
        if self.mix is not None:
            return self.mix
        return 0.5 if self.kind == "jsd" else 0.1

    def _log_probabilities(self, logits: "Tensor") -> "Tensor":
        exact = logits.double() if logits.itemsize == 8 else logits.float()
        return (exact / self.temperature).log_softmax(-1)

    @property
    def _factor(self) -> float:
        """The total variation is of first order in the logits, so it takes the temperature once."""
        return self.temperature if self.kind == "total_variation" else self.temperature**2


def kl(p: "Tensor", q: "Tensor") -> "Tensor":
    """`KL(p || q)` of log-probabilities `(positions, vocabulary)`."""
    return (p.exp() * (p - q)).sum(-1)


def _mixture(p: "Tensor", q: "Tensor", share: float) -> "Tensor":
    """The logarithm of `share p + (1 - share) q`."""
    return (p + math.log(share)).logaddexp(q + math.log1p(-share))


def _jsd(p: "Tensor", q: "Tensor", share: float) -> "Tensor":
    mixed = _mixture(p, q, share)
    return (share * kl(p, mixed) + (1 - share) * kl(q, mixed)) / (share * (1 - share))


def _skew(p: "Tensor", q: "Tensor", share: float) -> "Tensor":
    return kl(p, _mixture(p, q, share)) / (1 - share) ** 2


_KINDS: "dict[str, Callable[[Tensor, Tensor, float], Tensor]]" = {
    "forward_kl": lambda p, q, share: kl(p, q),
    "reverse_kl": lambda p, q, share: kl(q, p),
    "jsd": _jsd,
    "skew_forward_kl": _skew,
    "skew_reverse_kl": lambda p, q, share: _skew(q, p, share),
    "total_variation": lambda p, q, share: (p.exp() - q.exp()).abs().sum(-1) / 2,
}
