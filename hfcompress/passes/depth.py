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
"""Which decoder blocks a model does best without."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hfcompress.models.batch import Batch
from hfcompress.models.streaming import Stream, StreamedModel
from hfcompress.passes.processes import Processes
from hfcompress.passes.rows import spread_rows
from hfcompress.passes.trial import divergence_sums
from hfcompress.progress import Progress


class DepthSettings(Protocol):
    """What is asked of a recipe's step; see [`hfcompress.recipes.Prune`]."""

    @property
    def criterion(self) -> str: ...
    @property
    def contiguous(self) -> bool: ...
    @property
    def rows(self) -> int: ...


@torch.no_grad()
def blocks_to_keep(
    model: StreamedModel,
    count: int,
    settings: DepthSettings,
    batches: Sequence[Batch],
    processes: Processes,
    progress: Progress,
) -> list[int]:
    """
    Args:
        model (`StreamedModel`): the model.
        count (`int`): blocks to take out.
        settings (`DepthSettings`): how they are chosen.
        batches (`Sequence[Batch]`): this process's share of the calibration data.
        processes (`Processes`): who takes part; all choose the same.
        progress (`Progress`): is told of every round.

    Returns:
        `list[int]`: the blocks that stay, ascending.
    """
    progress.step("choosing blocks", amount=0)
    few, _ = spread_rows(batches, settings.rows, processes)
    streams = model.embed(few) if few else []
    every = range(len(model))
    windows = [frozenset(range(start, start + count)) for start in range(len(model) - count + 1)]
    if settings.criterion == "influence":
        influence = _influence(model, streams, processes)
        if settings.contiguous:
            gone = min(windows, key=lambda window: sum(influence[index] for index in window))
        else:
            gone = frozenset(sorted(every, key=influence.__getitem__)[:count])
        return [index for index in every if index not in gone]
    expected = model.forward_blocks(streams)
    if settings.contiguous:
        losses = _losses_without(model, streams, expected, frozenset(), windows, processes)
        gone = windows[losses.index(min(losses))]
    else:
        gone = frozenset()
        while len(gone) < count:
            progress.step(f"choosing blocks, {len(gone)} of {count}", amount=0)
            candidates = [frozenset({index}) for index in every if index not in gone]
            losses = _losses_without(model, streams, expected, gone, candidates, processes)
            gone |= candidates[losses.index(min(losses))]
    return [index for index in every if index not in gone]


def _influence(model: StreamedModel, streams: list[Stream], processes: Processes) -> list[float]:
    """How much each block turns its input, `1 - cos(input, output)`, mean over the tokens (ShortGPT, eq. 1)."""
    sums = torch.zeros(len(model) + 1, dtype=torch.float64, device=model.device)
    for index in range(len(model)):
        with model.block(index) as block:
            advanced = [s.advanced(model.call(block, index, s)) for s in streams]
        for before, after in zip(streams, advanced, strict=True):
            turned = 1 - torch.cosine_similarity(before.hidden.float(), after.hidden.float(), dim=-1)
            mask = before.batch.mask
            sums[index] += (turned if mask is None else turned[mask.to(turned.device)]).sum(dtype=torch.float64)
        streams = advanced
    return processes.sum(sums)[:-1].tolist()


def _losses_without(
    model: StreamedModel,
    streams: list[Stream],
    expected: list[Stream],
    gone: frozenset[int],
    candidates: Sequence[frozenset[int]],
    processes: Processes,
) -> list[float]:
    """
    KL(whole || without) for every candidate, summed over the tokens; each block is loaded once for all of them. A
    candidate goes the way of the others up to the first block that it leaves out.
    """
    own: dict[int, list[Stream]] = {}
    for index in (index for index in range(len(model)) if index not in gone):
        for number, candidate in enumerate(candidates):
            if index == min(candidate):
                own[number] = streams
        with model.block(index) as block:
            for number, found in own.items():
                if index not in candidates[number]:
                    own[number] = [s.advanced(model.call(block, index, s)) for s in found]
            streams = [s.advanced(model.call(block, index, s)) for s in streams]
    losses = torch.zeros(len(candidates), dtype=torch.float64, device=model.device)
    with model.outside(head=True) as whole:
        for place, wanted in enumerate(expected):
            logits = model.logits(whole, wanted)
            for number, found in own.items():
                losses[number] += _kl(logits, model.logits(whole, found[place]), wanted)
    return processes.sum(losses).tolist()


def _kl(expected: Tensor, logits: Tensor, stream: Stream) -> Tensor:
    return divergence_sums(expected, logits, stream.batch.mask)[0]
