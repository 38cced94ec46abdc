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
"""Perplexity and divergence from the original, streamed: never more than a block of either model in memory."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CheckpointError
from hfcompress.evaluation.comparison import whole_model
from hfcompress.formats.compressed_tensors import QUANT_METHOD, decoded
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import Batch, StreamedModel
from hfcompress.progress import Progress, Silent


LOGIT_BYTES = 1 << 26  # of one batch's logits in float32
BATCH_TOKENS = 4096


@torch.no_grad()
def measure_quality(
    candidate: Checkpoint,
    baseline: Checkpoint,
    tokens: Tokens,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """
    Compare a model with the one that it was made from.

    Args:
        candidate (`Checkpoint`): the model that is measured.
        baseline (`Checkpoint`): what it was made from.
        tokens (`Tokens`): the text.
        device (`torch.device`, *optional*): where.
        dtype (`torch.dtype`, *optional*): of the arithmetic; logits are compared in float32.
        progress (`Progress`, *optional*): is told of every block.

    Returns:
        `dict`: `perplexity`, `baseline_perplexity`, `kl_mean`, `kl_median`, `kl_p99` (nats, KL(baseline || candidate)
        over every predicted position), `top1_agreement`, `tokens` (predicted positions), `size_bytes`,
        `baseline_size_bytes`, and how it was measured.

    Raises:
        CheckpointError: the two models have different vocabularies.
    """
    progress = progress or Silent()
    sizes = [c.config.get_text_config().vocab_size for c in (candidate, baseline)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{candidate.name} has a vocabulary of {sizes[0]} and {baseline.name} one of {sizes[1]}; "
            "give the baseline that it was made from."
        )
    seq_len = tokens.input_ids.shape[1]
    rows = max(1, min(BATCH_TOKENS // seq_len, LOGIT_BYTES // (4 * seq_len * sizes[0])))
    batches = tokens.batch().split(rows)
    models = [open_for_logits(c, device, dtype) for c in (candidate, baseline)]
    for model, label in zip(models, ("evaluating", "evaluating the original"), strict=True):
        model.prepare(batches, progress, label)
    totals = _Totals()
    with contextlib.ExitStack() as stack:
        heads = [stack.enter_context(model.head()) for model in models]
        for index, batch in enumerate(batches):
            logits = [model.logits(head, index) for model, head in zip(models, heads, strict=True)]
            totals.add(*logits, batch)
    return {
        **totals.results(),
        "size_bytes": candidate.size_bytes,
        "baseline_size_bytes": baseline.size_bytes,
        "how": {
            "data": tokens.source,
            "data_sha256": tokens.sha256,
            "rows": len(tokens.input_ids),
            "seq_len": seq_len,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "baseline": baseline.name,
        },
    }


class _Totals:
    """Sums over the predicted positions."""

    def __init__(self):
        self.nll = self.baseline_nll = 0.0
        self.agree = self.count = 0
        self.kl: list[np.ndarray] = []

    def add(self, logits: Tensor, baseline_logits: Tensor, batch: Batch) -> None:
        for row in range(len(batch.input_ids)):
            targets = batch.input_ids[row, 1:].to(logits.device)
            ours, theirs = (x[row, :-1].float().log_softmax(-1) for x in (logits, baseline_logits))
            if batch.mask is not None:
                kept = (batch.mask[row, 1:] & batch.mask[row, :-1]).to(logits.device)
                targets, ours, theirs = targets[kept], ours[kept], theirs[kept]
            self.nll -= ours.gather(-1, targets[:, None]).double().sum().item()
            self.baseline_nll -= theirs.gather(-1, targets[:, None]).double().sum().item()
            self.agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            self.count += len(targets)
            self.kl.append((theirs.exp() * (theirs - ours)).sum(-1).cpu().numpy())

    def results(self) -> dict[str, Any]:
        kl = np.concatenate(self.kl).astype(np.float64)
        return {
            "perplexity": math.exp(min(self.nll / self.count, 700)),
            "baseline_perplexity": math.exp(min(self.baseline_nll / self.count, 700)),
            "kl_mean": float(kl.mean()),
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "top1_agreement": self.agree / self.count,
            "tokens": self.count,
        }


def open_for_logits(checkpoint: Checkpoint, device, dtype) -> "StreamedLogits | WholeLogits":
    """A dense or compressed-tensors checkpoint streamed; any other quantization loaded whole, by transformers."""
    config = checkpoint.quantization_config
    if config is None:
        return StreamedLogits(StreamedModel(checkpoint, device, dtype))
    if config.get("quant_method") == QUANT_METHOD:
        return StreamedLogits(StreamedModel(checkpoint, device, dtype, decoded(checkpoint.tensors, config)))
    return WholeLogits(checkpoint, device, dtype)


@dataclass
class StreamedLogits:
    """Logits of a model of which one block is in memory at a time."""

    model: StreamedModel

    def prepare(self, batches: list[Batch], progress: Progress, label: str) -> None:
        """Take all batches through all blocks."""
        streams = self.model.embed(batches)
        self.streams = self.model.forward_blocks(
            streams, lambda i: progress.step(f"{label}: block {i + 1} of {len(self.model)}")
        )

    def head(self):
        """A context in which logits can be had."""
        return self.model.outside(head=True)

    def logits(self, head, index: int) -> Tensor:
        """Logits of batch `index`."""
        return self.model.logits(head, self.streams[index])


class WholeLogits:
    """Logits of a model that only its own quantizer can read."""

    def __init__(self, checkpoint: Checkpoint, device, dtype):
        self.loaded = whole_model(checkpoint, torch.device(device), dtype)

    def prepare(self, batches: list[Batch], progress: Progress, label: str) -> None:
        """Nothing to do beforehand."""
        self.batches = batches

    def head(self):
        """A context in which logits can be had."""
        return self.loaded

    def logits(self, head, index: int) -> Tensor:
        """Logits of batch `index`."""
        batch = self.batches[index]
        mask = None if batch.mask is None else batch.mask.long().to(head.device)
        return head(input_ids=batch.input_ids.to(head.device), attention_mask=mask, use_cache=False).logits
