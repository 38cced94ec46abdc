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
How many bits each linear gets, where its codes are entropy-coded: more where an error costs more, the same number in all.

At a given rate the loss is least where one step `c`, in units of what errors cost, is that of all linears
([`hfcompress.solvers.coded`]). What rate each then has is told by the dense model's inputs on a few rows, before anything
is changed, and by what the outputs are worth to the predictions ([`hfcompress.passes.curvature`]).
"""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from hfcompress.models.batch import Batch
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.foresight import foresee
from hfcompress.passes.plan import LinearTask, Plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.statistics import Statistics
from hfcompress.progress import Progress
from hfcompress.solvers.coded import Curve, Steps, Unswept
from hfcompress.solvers.curvature import factorize_rows


SAMPLE = 1 << 17  # weights of a linear by which its rate is told
HALVINGS = 40
DIGITS = 3  # of a rate
SPREAD = 1.5  # bits more or less than the mean, at most
LEAST = 1.0  # bits, below which a linear loses far more than its curve says


def settle_rates(
    model: StreamedModel,
    plan: Plan,
    batches: Sequence[Batch],
    curvatures: Mapping[str, list[Tensor]],
    processes: Processes,
    progress: Progress,
) -> None:
    """
    Give every linear whose step asks for it a rate of its own, in the plan.

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
    progress.step("bits of each linear", amount=0)

    def curve(task: LinearTask, weight: Tensor, statistics: Statistics) -> Curve:
        factor = statistics.factor(task.settings.damping, True, task.name)
        return Unswept(weight, Steps.of(factor, factorize_rows(curvatures[task.name])), SAMPLE).curve()

    curves = foresee(model, asked, batches, processes, curve)
    sizes = {name: task.shape.in_features * task.shape.out_features for name, task in asked.items()}
    for bits in dict.fromkeys(task.settings.bits for task in asked.values()):
        own = [name for name, task in asked.items() if name in curves and task.settings.bits == bits]
        found = at_one_step({name: curves[name] for name in own}, {name: sizes[name] for name in own}, bits)
        for tasks in plan.blocks:
            for name in (name for name in own if name in tasks):
                grid = dataclasses.replace(tasks[name].grid, rate=found[name])
                tasks[name] = dataclasses.replace(tasks[name], grid=grid)


def at_one_step(curves: Mapping[str, Curve], sizes: Mapping[str, int], mean: float) -> dict[str, float]:
    """
    The rates at the one step at which their mean over all weights is `mean`.

    Args:
        curves (`Mapping[str, Curve]`): how the rate of every linear falls with the step.
        sizes (`Mapping[str, int]`): how many weights they have.
        mean (`float`): bits per weight.
    """
    total = sum(sizes.values())

    least = max(mean - SPREAD, min(mean, LEAST))

    def told(logarithm: float) -> dict[str, float]:
        rates = {name: curve.at(logarithm) for name, curve in curves.items()}
        return {name: min(max(rate, least), mean + SPREAD) for name, rate in rates.items()}

    low = min(curve.first for curve in curves.values())
    high = max(curve.first + len(curve.rates) / 2 for curve in curves.values())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = sum(bits * sizes[name] for name, bits in told(middle).items()) / total
        low, high = (middle, high) if found > mean else (low, middle)
    return {name: round(rate, DIGITS) for name, rate in told(low).items()}


def _asks(task: LinearTask) -> bool:
    return task.grid.type == "coded" and task.settings.allocation == "global"
