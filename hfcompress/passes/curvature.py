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
"""What the outputs of the linears are worth, found before anything is rounded by one backward pass through the model."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfcompress.models.activations import unrounded
from hfcompress.models.batch import Batch
from hfcompress.models.gradients import GradientCovariances
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.plan import LinearTask, Plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.rows import spread_rows
from hfcompress.passes.waypoint import Waypoint
from hfcompress.progress import Progress


ROWS = 64  # calibration rows that are gone back through; twice as many gained less than one part in a hundred
ROW_BLOCK = 512  # outputs whose curvature with one another is kept; half as many cost two parts in a hundred
KEPT = "curvature"  # as a file
LABELS = 0  # the seed of the labels


@dataclass
class Curvatures:
    """
    Args:
        linears (`dict[str, list[Tensor]]`): linear -> `E[g g^T]` of its output in blocks along the diagonal, float32
            `(rows, rows)` each.
        outputs (`list[Tensor]`): the same for the output of every decoder block, whole.
    """

    linears: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> "Curvatures":
        """What [`Curvatures.named`] gave."""
        found = cls()
        for name, block in named.items():
            linear, _, _ = name.rpartition(".")
            (found.linears.setdefault(linear, []) if linear else found.outputs).append(block)
        return found

    def named(self) -> dict[str, Tensor]:
        """The blocks of linears by the linear's name and a number, those of outputs by their number alone."""
        named = {f"{name}.{i}": block for name, blocks in self.linears.items() for i, block in enumerate(blocks)}
        return named | {str(i): block for i, block in enumerate(self.outputs)}


def rows_of(plan: Plan) -> int:
    """How many calibration rows are gone back through."""
    return max((task.curvature_rows or ROWS for task in _asking(plan)), default=ROWS)


def _asking(plan: Plan) -> list[LinearTask]:
    return [task for block in plan.blocks for task in block.values() if task.needs_curvature]


def stand_ins(tasks: Iterable[LinearTask]) -> dict[str, list[Tensor]]:
    """Curvatures of no meaning, in the shapes of those of the linears that ask for them: solving takes as long with them."""
    found = {}
    for task in (task for task in tasks if task.needs_curvature):
        sizes = [len(part) for part in torch.arange(task.shape.out_features).split(ROW_BLOCK)]
        found[task.name] = [torch.eye(size) + torch.full((size, size), 0.1) for size in sizes]
    return found


def output_curvatures(
    model: StreamedModel,
    plan: Plan,
    batches: Sequence[Batch],
    processes: Processes,
    progress: Progress,
    waypoint: Waypoint | None = None,
) -> Curvatures:
    """
    Found now, or by an earlier run that kept them.

    Args:
        model (`StreamedModel`): the dense model.
        plan (`Plan`): which linears want to know.
        batches (`Sequence[Batch]`): this process's share of the calibration data.
        processes (`Processes`): over which the sums are formed.
        progress (`Progress`): is told that it goes on.
        waypoint (`Waypoint`, *optional*): keeps them where that is worth it.
    """
    kept = None if waypoint is None else waypoint.found(KEPT, model.device)
    if kept is not None:
        return Curvatures.of(kept)
    began = time.perf_counter()
    widths = {task.name: task.shape.out_features for task in _asking(plan)}
    rows = rows_of(plan)
    found = GradientCovariances(model, widths, LABELS, ROW_BLOCK)
    progress.step("gradients of the predictions", amount=0)
    with unrounded(model.skeleton):
        for batch, first in zip(*spread_rows(batches, rows, processes), strict=True):
            found.add(batch, first)
    positions = processes.sum(torch.tensor(found.positions, device=model.device)).item()

    def mean(sums: Sequence[Tensor]) -> list[Tensor]:
        return [processes.sum(each).div_(max(positions, 1)) for each in sums]

    curvatures = Curvatures({name: mean(blocks) for name, blocks in found.blocks.items()}, mean(found.outputs))
    if waypoint is not None:
        waypoint.keep_found(KEPT, curvatures.named(), time.perf_counter() - began)
    return curvatures
