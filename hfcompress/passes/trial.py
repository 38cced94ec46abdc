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
"""What steps would cost a model, tried on a few rows: one walk that keeps nothing."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.calibration.tokens import Tokens
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import Stream, StreamedModel
from hfcompress.passes.block_pass import BlockPass
from hfcompress.passes.journal import Journal
from hfcompress.passes.plan import Plan
from hfcompress.passes.processes import Processes
from hfcompress.progress import Silent


ROWS = 16  # half of them to calibrate on, half to measure on
BATCH_TOKENS = 4096
POSITIONS = 128  # whose distributions are compared at once


def trial(
    model: StreamedModel,
    plan: Plan,
    layout,
    tokens: Tokens,
    reference: Checkpoint,
    processes: Processes,
    suspended: bool = True,
) -> float:
    """The same as [`trial_on`] on a few rows: the first 16 of `tokens`, half to calibrate on, half to measure on."""
    return trial_on(model, plan, layout, *halves(tokens), reference, processes, suspended)


@torch.no_grad()
def trial_on(
    model: StreamedModel,
    plan: Plan,
    layout,
    seen: Batch,
    unseen: Batch,
    reference: Checkpoint,
    processes: Processes,
    suspended: bool = True,
) -> float:
    """
    Solve a model in memory and block by block, and compare it with another on rows that it was not solved on.

    Args:
        model (`StreamedModel`): the model.
        plan (`Plan`): what is done to which of its linears.
        layout: the format of the result.
        seen (`Batch`): the rows it is solved on.
        unseen (`Batch`): the rows it is compared on.
        reference (`Checkpoint`): the dense model that it should be like.
        processes (`Processes`): who takes part; all get the same number.
        suspended (`bool`, *optional*, defaults to `True`): see [`BlockPass`].

    Returns:
        `float`: KL(reference || solved) in nats, from float32 logits, mean over the predicted positions.
    """
    calibration, held_out = (_share(rows, processes) for rows in (seen, unseen))
    dense = StreamedModel(reference, model.device, model.dtype)
    expected = dense.forward_blocks(dense.embed(held_out))
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)

    def judge(solved: PreTrainedModel, streams: list[Stream]) -> None:
        with dense.outside(head=True) as whole:
            for ours, theirs in zip(streams, expected, strict=True):
                wanted, given = dense.logits(whole, theirs), model.logits(solved, ours)
                sums.add_(divergence_sums(wanted, given, ours.batch.mask_of(given)))

    run = BlockPass(model, plan, layout, None, Journal(None, {}), processes, Silent(), suspended)
    run.run(calibration, held_out, judge)
    total, count = processes.sum(sums).tolist()
    return total / max(count, 1)


def halves(tokens: Tokens) -> tuple[Batch, Batch]:
    """Rows to calibrate on and rows to measure on; of a single row, its two halves."""
    few = tokens.batch(slice(0, ROWS))
    rows, length = few.input_ids.shape
    if rows > 1:
        first = rows - rows // 2
        return few.rows(slice(0, first)), few.rows(slice(first, rows))
    first = length - length // 2
    ids = few.input_ids.split([first, length - first], 1)
    masks = few.mask.split([first, length - first], 1) if few.mask is not None else (None, None)
    return Batch(ids[0], masks[0]), Batch(ids[1], masks[1])


def _share(batch: Batch, processes: Processes) -> list[Batch]:
    """This process's part, in pieces that go through the model together."""
    part = processes.share(len(batch.input_ids))
    if part.stop == part.start:
        return []
    return batch.rows(part).split(max(1, BATCH_TOKENS // batch.length))


def divergence_sums(expected: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    """KL(expected || logits) summed over positions that are no padding, and their number: float64 `(2,)`."""
    p, q = expected.flatten(0, 1), logits.flatten(0, 1)
    if mask is not None:
        kept = mask.flatten().to(p.device)
        p, q = p[kept], q[kept]
    total = torch.zeros(2, dtype=torch.float64, device=p.device)
    for wanted, given in zip(p.split(POSITIONS), q.split(POSITIONS), strict=True):
        log_p, log_q = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
        total[0] += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)
    total[1] = len(p)
    return total
