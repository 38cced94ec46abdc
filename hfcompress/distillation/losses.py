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
"""What a student is told by its teacher: sums over positions, in chunks, so that no whole batch of logits exists."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hfcompress.distillation.divergences import Divergence
from hfcompress.distillation.signals import Signal


FORWARD_KL = Divergence()
IGNORED = -100  # a label that is no target
PARTITIONED = "ds_id"  # of a parameter that DeepSpeed keeps in parts
Logits = Callable[[Tensor], Tensor]


def distillation_loss(
    student_hidden: Tensor,
    told: Mapping[str, Tensor],
    targets: Tensor,
    student_logits: Logits,
    signal: Signal,
    cross_entropy: float = 0.0,
    chunk: int = 512,
    parameters: Sequence[nn.Parameter] = (),
    divergence: Divergence = FORWARD_KL,
    divergence_weight: float = 1.0,
) -> Tensor:
    """
    `divergence_weight * sum divergence(teacher, student) + cross_entropy * sum -log student(target)` over the given
    positions.

    A sum, so that whoever divides it by the number of positions of a whole optimizer step has the same loss whatever
    the accumulation, the chunks and the padding (which is left out before the logits are made).

    Args:
        student_hidden (`Tensor`): `(positions, hidden_size)`, what the student's head receives.
        told (`Mapping[str, Tensor]`): what is known of the teacher, `(positions, ...)` each; no gradient goes there.
        targets (`Tensor`): int64 `(positions,)`, the token that follows.
        student_logits (`Callable`): from `(positions, hidden_size)` to `(positions, vocabulary)`.
        signal (`Signal`): knows what that says.
        cross_entropy (`float`, *optional*, defaults to 0): weight of the tokens that really follow.
        chunk (`int`, *optional*, defaults to 512): positions whose logits exist at a time.
        parameters (`Sequence[nn.Parameter]`, *optional*): of the student's head, where it learns too.
        divergence (`Divergence`, *optional*): of the two distributions; `KL(teacher || student)` if left out.
        divergence_weight (`float`, *optional*, defaults to 1): of it; with 0 the teacher is not asked.
    """

    def of_chunk(ours: Tensor, start: int) -> Tensor:
        part = slice(start, start + chunk)
        logits = student_logits(ours)
        loss = torch.zeros((), device=logits.device)
        if divergence_weight:
            heard = {name: tensor[part] for name, tensor in told.items()}
            loss = loss + divergence_weight * signal(heard, logits, divergence).sum()
        if cross_entropy:
            loss = loss + cross_entropy * nn.functional.cross_entropy(logits.float(), targets[part], reduction="sum")
        return loss

    if not torch.is_grad_enabled():
        parts = [of_chunk(student_hidden[s : s + chunk], s) for s in range(0, len(student_hidden), chunk)]
        return torch.stack([student_hidden.new_zeros((), dtype=torch.float32), *parts]).sum()
    if any(hasattr(parameter, PARTITIONED) for parameter in parameters):  # gathered only inside of modules' own calls
        starts = range(0, len(student_hidden), chunk)
        parts = [checkpoint(of_chunk, student_hidden[s : s + chunk], s, use_reentrant=False) for s in starts]
        return torch.stack([0.0 * student_hidden.sum(), *parts]).sum()
    return _ChunkedSum.apply(of_chunk, chunk, student_hidden, *parameters)


class _ChunkedSum(torch.autograd.Function):
    """
    The sum of a function over chunks of rows. The gradients are made chunk by chunk on the way forward and kept
    instead of the logits; they are as large as the hidden states and the parameters are.
    """

    @staticmethod
    def forward(ctx, function, chunk, hidden, *parameters):
        total = torch.zeros((), device=hidden.device)
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        learns = any(ctx.needs_input_grad[2:])
        to_hidden = torch.zeros_like(hidden if learns else hidden[:0])
        to_parameters = [torch.zeros_like(p) for p in wanted]
        for start in range(0, len(hidden), chunk):
            part = hidden[start : start + chunk].detach()
            if not learns:
                total += function(part, start)
                continue
            with torch.enable_grad():
                loss = function(part.requires_grad_(), start)
            grads = torch.autograd.grad(loss, [part, *wanted])
            to_hidden[start : start + chunk] = grads[0]
            for sum_, grad in zip(to_parameters, grads[1:], strict=True):
                sum_ += grad
            total += loss.detach()
        ctx.to_hidden, ctx.to_parameters = to_hidden, to_parameters
        return total

    @staticmethod
    def backward(ctx, *grads):
        left = iter(ctx.to_parameters)
        to_parameters = [grads[0] * next(left) if needed else None for needed in ctx.needs_input_grad[3:]]
        return None, None, grads[0] * ctx.to_hidden, *to_parameters
