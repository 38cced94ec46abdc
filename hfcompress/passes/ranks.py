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
Which rank each linear gets, where its weight becomes a product of two factors: more where what is left out costs more, the
same number of parameters in all ([`hfcompress.solvers.lowrank`]).
"""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from hfcompress.models.batch import Batch
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.foresight import foresee
from hfcompress.passes.plan import LinearTask, Plan, factored
from hfcompress.passes.processes import Processes
from hfcompress.passes.statistics import Statistics
from hfcompress.progress import Progress
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.lowrank import ranks_within, spectrum


def settle_ranks(
    model: StreamedModel,
    plan: Plan,
    batches: Sequence[Batch],
    curvatures: Mapping[str, list[Tensor]],
    processes: Processes,
    progress: Progress,
) -> None:
    """
    Give every linear whose step asks for it a rank of its own, in the plan.

    Args:
        model (`StreamedModel`): the dense model.
        plan (`Plan`): its tasks are replaced.
        batches (`Sequence[Batch]`): this process's share of the calibration data.
        curvatures (`Mapping[str, list[Tensor]]`): what the outputs are worth.
        processes (`Processes`): who takes part; all settle the same.
        progress (`Progress`): is told that it goes on.
    """
    asked = {n: t for tasks in plan.blocks for n, t in tasks.items() if _asks(t) and n in curvatures}
    if not asked:
        return
    progress.step("rank of each linear", amount=0)

    def lost(task: LinearTask, weight: Tensor, statistics: Statistics) -> Tensor:
        factor = statistics.factor(task.settings.damping, False, task.name)
        return spectrum(weight, factor.damped(statistics.gram), curvatures[task.name]).lost().cpu()

    told = foresee(model, asked, batches, processes, lost)
    for settings in dict.fromkeys((t.settings.ratio, t.settings.multiple) for t in asked.values()):
        own = [n for n, t in asked.items() if n in told and (t.settings.ratio, t.settings.multiple) == settings]
        shapes = {name: (asked[name].shape.out_features, asked[name].shape.in_features) for name in own}
        ranks = ranks_within({name: told[name] for name in own}, shapes, *settings)
        for tasks in plan.blocks:
            for name in (name for name in own if name in tasks):
                tasks[name] = _at_rank(tasks[name], ranks[name])


def _asks(task: LinearTask) -> bool:
    return task.grid.type == "factors" and getattr(task.settings, "allocation", None) == "global"


def _at_rank(task: LinearTask, rank: int | None) -> LinearTask:
    bits = 8 * task.scale_dtype.itemsize
    grid = Grid(bits, type="plain") if rank is None else factored(task.shape, rank, bits)
    return dataclasses.replace(task, grid=grid)
