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
How far a student's hidden states are from its teacher's, block by block.

All are sums over positions, each with its row's other positions alone: so a step may be divided into batches as one likes.
Where the widths differ, a linear map of the student's comes before; it learns too, and is not stored.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from hfcompress.distillation.divergences import FLOOR, kl
from hfcompress.distillation.objective import FeatureLoss


SHARPNESS = 10.0  # of similarities: a cosine times this is a logit
DEFAULT_BLOCKS = 4  # of the student's that are compared
JUDGE_WIDTH = 64


def default_map(student: int, teacher: int, kept: Sequence[int] | None = None) -> dict[int, int]:
    """
    Which of the teacher's blocks some of the student's are compared with.

    Args:
        student (`int`): number of its blocks.
        teacher (`int`): likewise.
        kept (`Sequence[int]`, *optional*): which of the teacher's blocks the student's are; in proportion if not known.
    """
    count = min(DEFAULT_BLOCKS, student)
    chosen = [round((number + 1) * student / count) - 1 for number in range(count)]
    if kept is not None and len(kept) == student:
        return {index: kept[index] for index in chosen}
    return {index: round((index + 1) * teacher / student) - 1 for index in chosen}


class Features(nn.Module):
    """
    Args:
        kind (`str`): `"mse"` is `|s - t|^2 / |t|^2` (SquareHead, arXiv 2310.06927, eq. 1, per position); `"cosine"` is `1 -
            cos(s, t)`; `"relation"` is the KL divergence of how a position's similarities to those before it are spread
            (MiniLMv2, arXiv 2012.15828, section 3.1, of hidden states), which needs no map between widths; `"contrastive"`
            is the cross-entropy of finding a position's teacher among those of its row (CRD, arXiv 1910.10699, with the row
            as negatives); `"adversarial"` is that of a small judge, which learns to tell the student's from the teacher's
            while the student learns that it cannot (arXiv 1406.2661, both in one step by the reversed gradient of arXiv
            1505.07818, section 4).
        blocks (`Mapping[int, int]`): of the student's blocks -> of the teacher's.
        width (`int`): the student's hidden size.
        teacher_width (`int`): likewise.
        seed (`int`): of the maps' beginning.
        device (`torch.device`, *optional*): where they are.
        dtype (`torch.dtype`, *optional*): of the arithmetic.
    """

    def __init__(
        self,
        kind: FeatureLoss,
        blocks: Mapping[int, int],
        width: int,
        teacher_width: int,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.kind, self.blocks = kind, dict(blocks)
        self.maps = nn.ModuleList()
        if width != teacher_width and kind != "relation":
            generator = torch.Generator().manual_seed(seed)
            for _ in self.blocks:
                made = nn.Linear(width, teacher_width, bias=False)
                nn.init.orthogonal_(made.weight, generator=generator)
                self.maps.append(made)
        self.judges = nn.ModuleList()
        if kind == "adversarial":
            generator = torch.Generator().manual_seed(seed)
            for _ in self.blocks:
                sizes = teacher_width, JUDGE_WIDTH, 1
                layers = [nn.Linear(*size) for size in pairwise(sizes)]
                for layer in layers:
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
                    nn.init.zeros_(layer.bias)
                self.judges.append(nn.Sequential(layers[0], nn.GELU(), layers[1]))
        self.to(device, dtype)

    def forward(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], mask: Tensor) -> Tensor:
        """
        Args:
            ours (`Sequence[Tensor]`): `(rows, seq_len, width)` for each block.
            theirs (`Sequence[Tensor]`): `(rows, seq_len, teacher_width)`.
            mask (`Tensor`): bool `(rows, seq_len)`, the positions that count.

        Returns:
            `Tensor`: the mean over the blocks of the sum over the positions; float32, or float64 of float64.
        """
        total = torch.zeros((), device=mask.device)
        for number, (student, teacher) in enumerate(zip(ours, theirs, strict=True)):
            mapped = self.maps[number](student) if len(self.maps) else student
            exact = mapped.double() if mapped.itemsize == 8 else mapped.float()
            compare = _adversarial(self.judges[number]) if len(self.judges) else _KINDS[self.kind]
            total = total + compare(exact, teacher.to(exact), mask)
        return total / len(self.blocks)


def _mse(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    ours, theirs = ours[mask], theirs[mask]
    size = theirs.square().sum(-1).clamp(min=torch.finfo(theirs.dtype).tiny)
    return ((ours - theirs).square().sum(-1) / size).sum()


def _cosine(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    return (1 - nn.functional.cosine_similarity(ours[mask], theirs[mask], dim=-1)).sum()


def _relation(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril(-1) & mask[:, None, :]
    counts = mask & seen.any(-1)
    spread = []
    for hidden in (theirs, ours):
        unit = nn.functional.normalize(hidden, dim=-1)
        scores = (unit @ unit.mT) * SHARPNESS
        spread.append(scores.masked_fill(~seen, FLOOR)[counts].log_softmax(-1))
    return kl(*spread).sum()


def _contrastive(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    scores = nn.functional.normalize(ours, dim=-1) @ nn.functional.normalize(theirs, dim=-1).mT * SHARPNESS
    found = scores.masked_fill(~mask[:, None, :], FLOOR)[mask].log_softmax(-1)
    own = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask]
    return -found.gather(-1, own[:, None]).sum()


class _Reversed(torch.autograd.Function):
    """Itself, with its gradient's sign turned."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, *grads):
        return -grads[0]


def _adversarial(judge: nn.Module) -> "Comparison":
    """What telling the two apart costs the judge: of its probabilities for the teacher, `-log p(t) - log(1 - p(s))`."""

    def compare(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
        weights = next(judge.parameters())
        seen = [
            nn.functional.rms_norm(each[mask], each.shape[-1:]).to(weights) for each in (_Reversed.apply(ours), theirs)
        ]
        student, teacher = (judge(each).to(ours) for each in seen)
        return (nn.functional.softplus(student) + nn.functional.softplus(-teacher)).sum()

    return compare


Comparison = Callable[[Tensor, Tensor, Tensor], Tensor]
_KINDS: dict[str, Comparison] = {
    "mse": _mse,
    "cosine": _cosine,
    "relation": _relation,
    "contrastive": _contrastive,
}
