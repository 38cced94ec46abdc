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
Which blocks lean on which: those whose linears lose least, if they become another block's and a difference of low rank,
told by the dense model's inputs and by what the outputs are worth to the predictions ([`hfcompress.solvers.lowrank`]).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from hfcompress.models.batch import Batch
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.foresight import foresee
from hfcompress.passes.plan import LinearTask, Plan, lean, namesake
from hfcompress.passes.processes import Processes
from hfcompress.passes.statistics import Statistics
from hfcompress.progress import Progress
from hfcompress.solvers.lowrank import spectrum


def settle_sharing(
    model: StreamedModel,
    plan: Plan,
    batches: Sequence[Batch],
    curvatures: Mapping[str, list[Tensor]],
    processes: Processes,
    progress: Progress,
) -> None:
    """
    Let blocks lean on those that are best for it, in the plan.

    Args:
        model (`StreamedModel`): the dense model.
        plan (`Plan`): its tasks are replaced.
        batches (`Sequence[Batch]`): this process's share of the calibration data.
        curvatures (`Mapping[str, list[Tensor]]`): what the outputs are worth.
        processes (`Processes`): who takes part; all settle the same.
        progress (`Progress`): is told that it goes on.
    """
    asked = {
        n: t for tasks in plan.blocks for n, t in tasks.items() if hasattr(t.settings, "reach") and n in curvatures
    }
    if not asked:
        return
    progress.step("blocks that are alike", amount=0)
    settings = next(iter(asked.values())).settings  # the step has no overrides, and there is one
    places = {name: index for index, tasks in enumerate(plan.blocks) for name in tasks}
    total = len(plan.blocks)

    def lost(task: LinearTask, weight: Tensor, statistics: Statistics) -> dict[int, float]:
        own = places[task.name]
        gram = statistics.factor(task.settings.damping, False, task.name).damped(statistics.gram)
        found = {}
        for other in range(max(0, own - settings.reach), min(total, own + settings.reach + 1)):
            base = namesake(model, task, own, other) if other != own else None
            if base is not None:
                tails = spectrum(weight - base.read().float().to(weight.device), gram, curvatures[task.name]).lost()
                found[other] = tails[min(settings.rank, len(tails) - 1)].item()
        return found

    costs: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for name, found in foresee(model, asked, batches, processes, lost).items():
        for other, cost in found.items():
            costs[places[name]][other] += cost
    lean(model, plan, cheapest(costs, settings.count(total)))


def cheapest(costs: Mapping[int, Mapping[int, float]], count: int) -> dict[int, int]:
    """
    Who leans on whom: one after the other the pair that costs least, of which the one is leant on by none and the other
    leans on none.

    Args:
        costs (`Mapping[int, Mapping[int, float]]`): of each block, what it costs to lean on another.
        count (`int`): how many do.
    """
    pairs = sorted((cost, own, other) for own, others in costs.items() for other, cost in others.items())
    found: dict[int, int] = {}
    for _, own, other in pairs:
        if len(found) < count and own not in found and own not in found.values() and other not in found:
            found[own] = other
    return found
