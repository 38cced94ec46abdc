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
"""What an encoder without a head loses: how its states and its rows' embeddings turn, and what that does to their likeness."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hfcompress.calibration.tokens import Tokens
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.logits import finite, open_for_logits
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint


BATCH_TOKENS = 8192


@torch.no_grad()
def states(checkpoint: Checkpoint, comparison: Comparison, batches: list[Batch], label: str) -> list[Tensor]:
    """What a model returns for every batch, float32 `(rows, seq_len, hidden_size)` on the CPU."""
    model = open_for_logits(checkpoint, comparison.device, comparison.dtype)
    model.prepare(batches, comparison.progress, label)
    with model.head() as head:
        return [finite(model.logits(head, index).float(), checkpoint).cpu() for index in range(len(batches))]


def embedded(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over a row's tokens, as most models for sentences have it: `(rows, hidden_size)`."""
    kept = torch.ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
    return (hidden * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)


def turned(comparison: Comparison, tokens: Tokens | None = None, label: str = "evaluating") -> dict[str, Any]:
    """
    Args:
        comparison (`Comparison`): two encoders without heads.
        tokens (`Tokens`, *optional*): defaults to the comparison's.
        label (`str`, *optional*): what the progress bar says.

    Returns:
        `dict`: `cosine_mean`, `cosine_stderr` (over rows) and `cosine_min` between what the two return for a token;
        `embedding_cosine_mean` and `embedding_cosine_min` between what they return for a row, the mean of its tokens;
        `likeness_change`, the root of the mean squared change of the cosine between two rows, and `likeness_spread`, the standard
        deviation of that cosine among the original's; `tokens` and `rows`.
    """
    tokens = comparison.tokens if tokens is None else tokens
    batches = tokens.batch().split(max(1, BATCH_TOKENS // tokens.input_ids.shape[1]))
    ours = states(comparison.candidate, comparison, batches, label)
    theirs = states(comparison.baseline, comparison, batches, f"{label}: the original")
    by_row, cosines, embeddings = [], [], ([], [])
    for batch, mine, wanted in zip(batches, ours, theirs, strict=True):
        own = functional.cosine_similarity(mine, wanted, dim=-1)
        kept = torch.ones_like(own, dtype=torch.bool) if batch.mask is None else batch.mask
        cosines.append(own[kept])
        by_row += [row[seen].mean() for row, seen in zip(own, kept, strict=True) if seen.any()]
        for found, hidden in zip(embeddings, (mine, wanted), strict=True):
            found.append(embedded(hidden, batch.mask))
    mine, wanted = (functional.normalize(torch.cat(found), dim=-1) for found in embeddings)
    rows, every = torch.stack(by_row), torch.cat(cosines)
    between = torch.ones(len(mine), len(mine)).triu(1) > 0
    alike, before = (mine @ mine.T)[between], (wanted @ wanted.T)[between]
    several = len(before) > 0
    return {
        "cosine_mean": every.mean().item(),
        "cosine_stderr": rows.std().item() / len(rows) ** 0.5 if len(rows) > 1 else None,
        "cosine_min": every.min().item(),
        "embedding_cosine_mean": (mine * wanted).sum(1).mean().item(),
        "embedding_cosine_min": (mine * wanted).sum(1).min().item(),
        "likeness_change": (alike - before).square().mean().sqrt().item() if several else None,
        "likeness_spread": before.std().item() if len(before) > 1 else None,
        "tokens": len(every),
        "rows": len(mine),
    }
