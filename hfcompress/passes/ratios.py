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
How many zeros each linear gets, where a pattern leaves it open: more where they cost less, the same number in all.

Told by the dense model's inputs on a few rows, before anything is changed. `"owl"`: by the share of entries that stand
out among `|w| ||x_j||`, block by block (Outlier Weighed Layerwise sparsity, Yin et al., arXiv 2310.05175). `"global"`: by
one threshold over all weights on `w^2 C_ii H_jj`, which is what zeroing an entry alone costs in nats, with `C` what the
outputs are worth to the predictions ([`hfcompress.passes.curvature`]).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfcompress.models.batch import Batch
from hfcompress.models.roles import find_linears, get_weight, watch_inputs
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.plan import LinearTask, Plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.rows import spread_rows
from hfcompress.passes.statistics import flat_tokens
from hfcompress.progress import Progress


UNIFORM, OWL, GLOBAL = "uniform", "owl", "global"
ROWS = 16  # calibration rows
OUTLIER = 5.0  # times the mean, from which on an entry stands out
BINS, FINEST, COARSEST = 8192, -40.0, 10.0  # of the histogram of log10 scores
HALVINGS = 60


def settle_ratios(
    model: StreamedModel,
    plan: Plan,
    batches: Sequence[Batch],
    curvatures: Mapping[str, list[Tensor]],
    processes: Processes,
    progress: Progress,
) -> None:
    """
    Give every linear whose step asks for it a sparsity of its own, in the plan.

    Args:
        model (`StreamedModel`): the dense model.
        plan (`Plan`): its tasks are replaced.
        batches (`Sequence[Batch]`): this process's share of the calibration data.
        curvatures (`Mapping[str, list[Tensor]]`): what the outputs are worth, for steps that ask for it.
        processes (`Processes`): who takes part; all settle the same.
        progress (`Progress`): is told that it goes on.
    """
    asked = {n: t for tasks in plan.blocks for n, t in tasks.items() if _asks(t)}
    if not asked:
        return
    progress.step("sparsity of each linear", amount=0)
    sizes = {name: task.shape.in_features * task.shape.out_features for name, task in asked.items()}
    steps: list[Any] = []
    for task in asked.values():
        if task.sparsity not in steps:
            steps.append(task.sparsity)
    scores = _scores(model, asked, batches, curvatures, processes)
    for step in steps:
        own = [name for name, task in asked.items() if task.sparsity == step]
        wanted = _by_outliers(own, scores, step) if step.ratios == OWL else _by_threshold(own, scores, step)
        found = within(wanted, {name: sizes[name] for name in own}, step.sparsity, step.spread)
        for tasks in plan.blocks:
            for name in (name for name in own if name in tasks):
                sparsity = dataclasses.replace(step, sparsity=found[name])
                settings = sparsity if tasks[name].settings is tasks[name].sparsity else tasks[name].settings
                tasks[name] = dataclasses.replace(tasks[name], sparsity=sparsity, settings=settings)


def within(wanted: Mapping[str, float], sizes: Mapping[str, int], mean: float, spread: float) -> dict[str, float]:
    """
    The shares that are wanted, moved together and kept within `mean +- spread`, so that their mean over all entries is
    `mean`.
    """
    least, most = max(mean - spread, 0.0), min(mean + spread, 1.0 - 1e-3)
    total = sum(sizes.values())

    def moved(by: float) -> dict[str, float]:
        return {name: min(max(share + by, least), most) for name, share in wanted.items()}

    low, high = -1.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = sum(share * sizes[name] for name, share in moved(middle).items()) / total
        low, high = (middle, high) if found < mean else (low, middle)
    return moved(high)


def _asks(task: LinearTask) -> bool:
    return task.sparsity is not None and getattr(task.sparsity, "ratios", UNIFORM) != UNIFORM


@torch.no_grad()
def _scores(
    model: StreamedModel,
    asked: Mapping[str, LinearTask],
    batches: Sequence[Batch],
    curvatures: Mapping[str, list[Tensor]],
    processes: Processes,
) -> dict[str, tuple[float, Tensor]]:
    """For every linear the share of outliers, and the histogram of its scores."""
    few, _ = spread_rows(batches, ROWS, processes)
    streams = model.embed(few) if few else []
    found = {}
    for index, block_name in enumerate(model.block_names):
        with model.block(index) as block:
            linears = {n: m for n, m in find_linears(block, block_name).items() if n in asked}
            squares = {n: torch.zeros(asked[n].shape.in_features + 1, device=model.device) for n in linears}
            advanced = []
            for stream in streams:

                def seen(name: str, inputs: Tensor, batch: Batch = stream.batch, squares=squares) -> None:
                    x = flat_tokens(inputs, batch.mask_of(inputs))
                    squares[name][:-1] += x.square().sum(0)
                    squares[name][-1] += len(x)

                with watch_inputs(linears, seen):
                    advanced.append(stream.advanced(model.call(block, index, stream)))
            streams = advanced
            for name, linear in linears.items():
                sums = processes.sum(squares[name])
                power = sums[:-1] / sums[-1].clamp(min=1)
                found[name] = _told(get_weight(linear), power, curvatures.get(name))
    return found


def _told(weight: Tensor, power: Tensor, curvature: list[Tensor] | None) -> tuple[float, Tensor]:
    seen = weight.abs() * power.sqrt()
    outliers = (seen > OUTLIER * seen.mean()).float().mean().item()
    cost = seen.square_()
    if curvature is not None:
        cost = cost * torch.cat([block.diagonal() for block in curvature]).to(cost.device)[:, None]
    logs = cost.clamp_(min=10**FINEST).log10_().cpu()
    return outliers, torch.histc(logs, BINS, FINEST, COARSEST)


def _by_outliers(names: list[str], scores: Mapping[str, tuple[float, Tensor]], step) -> dict[str, float]:
    """Fewer zeros where more stands out: the blocks' shares of outliers spread over twice `step.spread`."""
    blocks: dict[str, list[float]] = {}
    for name in names:
        blocks.setdefault(_block(name), []).append(scores[name][0])
    shares = {block: sum(own) / len(own) for block, own in blocks.items()}
    least, most = min(shares.values()), max(shares.values())
    scale = 2 * step.spread / (most - least) if most > least else 0.0
    return {name: step.sparsity - (shares[_block(name)] - least) * scale for name in names}


def _by_threshold(names: list[str], scores: Mapping[str, tuple[float, Tensor]], step) -> dict[str, float]:
    """The shares of each linear that one threshold over all of them cuts off."""
    below = {name: scores[name][1].cumsum(0) for name in names}
    total = torch.stack(list(below.values())).sum(0)
    cut = int(torch.searchsorted(total, step.sparsity * total[-1]))
    return {name: (counts[cut] / counts[-1]).item() for name, counts in below.items()}


def _block(name: str) -> str:
    """The decoder block that a linear is in: its name up to the number."""
    parts = name.split(".")
    number = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])
