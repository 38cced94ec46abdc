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
Rows that the student has said itself, for its teacher to comment on (on-policy distillation: GKD, arXiv 2306.13649,
algorithm 1).

A row's prompt is what stands before its first label, or its first half where every token is one; what follows is drawn
from the student as it is now. No gradient goes through the drawing. Whoever counts labels counts them afterwards.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hfcompress.distillation.losses import IGNORED
from hfcompress.errors import InvalidValueError


class Generating(Protocol):
    """A causal language model of transformers."""

    training: bool
    config: Any
    generation_config: Any

    def generate(self, **kwargs: Any) -> Any: ...

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...


def prompts(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """
    Of every row of a batch what it begins with, int64 `(tokens,)`.

    Args:
        batch (`Mapping`): `input_ids`, `labels` and perhaps `attention_mask`, `(rows, seq_len)` each.

    Raises:
        InvalidValueError: the rows are packed, so that none has a beginning of its own.
    """
    if batch.get("position_ids") is not None:
        raise InvalidValueError(
            "on_policy needs rows of one text each; give them without position_ids, or leave it out."
        )
    found = []
    masks = batch.get("attention_mask")
    for index, ids in enumerate(batch["input_ids"]):
        kept = torch.ones_like(ids, dtype=torch.bool) if masks is None else masks[index].bool()
        ids, predicted = ids[kept], (batch["labels"][index][kept] != IGNORED).nonzero()
        first = int(predicted[0]) if len(predicted) else 0
        found.append(ids[: first if first > 1 else max(1, len(ids) // 2)])
    return found


@torch.no_grad()
def continued(
    model: nn.Module, beginnings: list[Tensor], length: int, temperature: float, synced: bool = False
) -> dict[str, Tensor]:
    """
    Texts as the student goes on with them, padded on the right, whose labels are what it has said.

    Args:
        model (`PreTrainedModel`): the student.
        beginnings (`list[Tensor]`): int64 `(tokens,)` each.
        length (`int`): tokens that are drawn, at most; fewer where a text ends, or the model's context does.
        temperature (`float`): of the drawing.
        synced (`bool`, *optional*, defaults to `False`): go on until every process has ended, as parts of a divided model
            must.

    Returns:
        `dict[str, Tensor]`: `input_ids`, `attention_mask` and `labels`, int64 `(rows, seq_len)`.
    """
    student: Generating = model  # ty: ignore[invalid-assignment]
    longest = max(map(len, beginnings))
    context = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if context is not None:
        length = min(length, context - longest)
    if length < 1:
        raise InvalidValueError(
            f"A prompt of on_policy has {longest} tokens, and {context} is all that the student takes; give shorter rows."
        )
    ends = student.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    device = beginnings[0].device
    ids = torch.zeros(len(beginnings), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, beginning in enumerate(beginnings):
        ids[row, longest - len(beginning) :] = beginning
        mask[row, longest - len(beginning) :] = 1
    training = student.training
    student.eval()
    try:
        said = student.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=length,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=ends[0] if ends else 0,
            synced_gpus=synced,
        )[:, longest:]
    finally:
        student.train(training)
    rows = []
    for beginning, drawn in zip(beginnings, said, strict=True):
        over = torch.isin(drawn, torch.tensor(ends, device=device)).nonzero() if ends else []
        rows.append((beginning, drawn[: int(over[0]) + 1] if len(over) else drawn))
    return _batch(rows)


def _batch(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    size = len(rows), max(len(beginning) + len(drawn) for beginning, drawn in rows)
    ids = torch.zeros(size, dtype=torch.long, device=rows[0][0].device)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (beginning, drawn) in enumerate(rows):
        first, last = len(beginning), len(beginning) + len(drawn)
        ids[row, :first], ids[row, first:last] = beginning, drawn
        mask[row, :last], labels[row, first:last] = 1, drawn
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
