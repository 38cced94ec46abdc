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
What a student hears of its teacher's distributions at some positions: all of it, computed now, or what a cache has kept.

Of the `k` most probable tokens and the mass of the rest, every divergence is that of distributions with the rest as one
outcome: at most what it is of the whole ones (the log-sum inequality, Cover and Thomas 2006, theorem 2.7.1), and the same
with `k` the vocabulary. Of tokens drawn from the teacher the cross-entropy has the right mean, and so has its gradient
(random sampling distillation, arXiv 2503.16870, section 3), whereas the `k` largest, put back to a sum of one, have not.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from hfcompress.distillation.divergences import FLOOR, Divergence


LEAST = 1e-12  # mass of the rest


class Signal(Protocol):
    """A teacher, as far as it is heard."""

    def __call__(self, told: Mapping[str, Tensor], logits: Tensor, divergence: Divergence) -> Tensor:
        """
        Args:
            told (`Mapping[str, Tensor]`): what is known of it, `(positions, ...)` each.
            logits (`Tensor`): the student's, `(positions, vocabulary)`.
            divergence (`Divergence`): which.

        Returns:
            `Tensor`: `(positions,)`.
        """
        ...


class Live:
    """
    `hidden`, what the teacher's last block returned, `(positions, hidden_size)`.

    Args:
        head (`Callable`): to its logits.
        vocabulary (`int`, *optional*): how many ids the student shares, counted from 0.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], vocabulary: int | None = None):
        self.head, self.vocabulary = head, vocabulary

    def __call__(self, told: Mapping[str, Tensor], logits: Tensor, divergence: Divergence) -> Tensor:
        with torch.no_grad():
            theirs = self.head(told["hidden"])[:, : self.vocabulary]
        return divergence(theirs, logits)


class Largest:
    """`ids`, the `k` most probable tokens, their `log_probs`, and `rest`, the logarithm of the others' mass."""

    @staticmethod
    @torch.no_grad()
    def of(logits: Tensor, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What is kept of the teacher's logits `(..., vocabulary)`."""
        log_probs = logits.double().log_softmax(-1)
        top = log_probs.topk(min(size, logits.shape[-1]))
        rest = (1 - top.values.exp().sum(-1)).clamp(min=LEAST).log()
        return {"ids": top.indices.int(), "log_probs": top.values.float(), "rest": rest.float()}

    def __call__(self, told: Mapping[str, Tensor], logits: Tensor, divergence: Divergence) -> Tensor:
        exact = logits.double() if logits.itemsize == 8 else logits.float()
        ours, theirs, ids = exact.log_softmax(-1), told["log_probs"].to(exact), told["ids"].long()
        known = ids < logits.shape[-1]
        kept = ours.gather(-1, ids.clamp(max=logits.shape[-1] - 1)).masked_fill(~known, FLOOR)
        others = _log_of_rest(kept)
        return divergence.between(
            torch.cat([theirs.masked_fill(~known, FLOOR), told["rest"].to(exact)[:, None]], -1),
            torch.cat([kept, others[:, None]], -1),
        )


def _log_of_rest(log_probs: Tensor) -> Tensor:
    """The logarithm of the mass that is left, `(positions,)`."""
    mass = log_probs.double().exp().sum(-1)
    return torch.log1p(-mass.clamp(max=1 - LEAST)).to(log_probs)


class Drawn:
    """`ids`, tokens drawn from the teacher with replacement, and `entropy`, of its whole distribution in nats."""

    @staticmethod
    @torch.no_grad()
    def of(logits: Tensor, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What is kept of the teacher's logits `(..., vocabulary)`."""
        log_probs = logits.double().log_softmax(-1)
        flat = log_probs.exp().reshape(-1, logits.shape[-1]).float().cpu()
        ids = torch.multinomial(flat, size, replacement=True, generator=generator)
        entropy = -(log_probs.exp() * log_probs.clamp(min=FLOOR)).sum(-1)
        return {"ids": ids.reshape(*logits.shape[:-1], size).int(), "entropy": entropy.float().cpu()}

    def __call__(self, told: Mapping[str, Tensor], logits: Tensor, divergence: Divergence) -> Tensor:
        """Its forward KL, whatever the divergence: with the right mean, and below zero by chance."""
        exact = logits.double() if logits.itemsize == 8 else logits.float()
        ids = told["ids"].long().clamp(max=logits.shape[-1] - 1)
        return -exact.log_softmax(-1).gather(-1, ids).mean(-1) - told["entropy"].to(exact)


CACHED: dict[str, type[Largest] | type[Drawn]] = {"top_k": Largest, "sampled": Drawn}
