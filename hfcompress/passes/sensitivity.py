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
"""What every choice for every unit would cost: the error that the recipe's own step leaves, weighed by the gradients.

A unit is what a serving engine fuses: linears of a block that read the same tensor (queries, keys and values; gate and
up). To second order, and with the errors of different tokens and outputs taken as independent, a change `dW` of a
linear's weight moves the predictions by `KL = 1/2 sum_r E[(dL/dy_r)^2] (dW H dW^T)_rr` nats per token, with `H` the
second moment of its inputs and `L` the log-likelihood of a label drawn from the model. Two choices of every unit are
measured as well, and the prediction is brought in line with them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.errors import InvalidValueError
from hfcompress.models.batch import Batch
from hfcompress.models.experts import ExpertLinear
from hfcompress.models.gradients import SquaredGradients
from hfcompress.models.roles import Linear, find_linears, get_weight, shared_inputs, watch_inputs
from hfcompress.models.streaming import Stream, StreamedModel
from hfcompress.passes.plan import LinearTask
from hfcompress.passes.processes import Processes
from hfcompress.passes.solving import solve_group
from hfcompress.passes.statistics import Statistics
from hfcompress.passes.swaps import Swap, Swaps
from hfcompress.progress import Progress


Options = Mapping[str, LinearTask]  # the name of a choice -> what would be done


@dataclass(frozen=True)
class Unit:
    """
    Linears that share a choice.

    Args:
        names (`tuple[str, ...]`): the linears.
        errors (`dict[str, dict[str, Tensor]]`): choice -> linear -> float32 `(out_features,)`: the mean squared error
            of every output, `diag(dW H dW^T)`.
        measured (`dict[str, float]`): choice -> KL in nats with this unit alone changed, for some of the choices.
    """

    names: tuple[str, ...]
    errors: Mapping[str, Mapping[str, Tensor]]
    measured: Mapping[str, float] = field(default_factory=dict)

    def predicted(self, squared_gradients: Mapping[str, Tensor]) -> dict[str, float]:
        """
        Args:
            squared_gradients (`Mapping[str, Tensor]`): linear -> `(out_features,)`, mean over the tokens.

        Returns:
            `dict[str, float]`: choice -> nats per token.
        """
        return {
            choice: sum(0.5 * (squared_gradients[n].double() @ e.double()).item() for n, e in errors.items())
            for choice, errors in self.errors.items()
        }


def mean_squared_gradients(
    model: StreamedModel,
    linears: Mapping[str, int],
    batch: Batch | None,
    first: int,
    seed: int,
    processes: Processes,
) -> dict[str, Tensor]:
    """
    Args:
        model (`StreamedModel`): the dense model.
        linears (`Mapping[str, int]`): name -> out_features.
        batch (`Batch` or `None`): this process's share of the rows.
        first (`int`): the number of its first row.
        seed (`int`): of the labels.
        processes (`Processes`): over which the sums are formed.

    Returns:
        `dict[str, Tensor]`: name -> float32 `(out_features,)`.
    """
    found = SquaredGradients(model, linears, seed)
    if batch is not None:
        found.add(batch, first)
    positions = processes.sum(torch.tensor(found.positions, device=model.device)).item()
    return {name: processes.sum(sums) / max(positions, 1) for name, sums in found.sums.items()}


@torch.no_grad()
def unit_errors(
    model: StreamedModel,
    options: Mapping[str, Options],
    layout,
    batches: list[Batch],
    few: list[Batch],
    processes: Processes,
    progress: Progress,
) -> list[Unit]:
    """
    One walk over the dense model: what each unit's inputs are, and what each choice makes of its weights.

    Args:
        model (`StreamedModel`): the dense model; it stays so.
        options (`Mapping[str, Options]`): linear -> its choices.
        layout: the format, which knows what a reader will make of the codes.
        batches (`list[Batch]`): this process's share of the calibration data.
        few (`list[Batch]`): its share of the rows on which single units are measured.
        processes (`Processes`): over which the statistics are summed.
        progress (`Progress`): is told of every block.

    Raises:
        InvalidValueError: linears that read the same tensor have no choice in common.
    """
    streams, probe, swaps = model.embed(batches), model.probe(), Swaps(model, few)
    units = []
    for index, block_name in enumerate(model.block_names):
        progress.step(f"sensitivity: block {index + 1} of {len(model)}", amount=0)
        with model.block(index) as block:
            linears = find_linears(block, block_name)
            groups = shared_inputs(model, block, index, probe, {name for name in linears if name in options})
            statistics = {names[0]: _empty(options, names, model) for names in groups}
            streams = _advance(model, block, index, streams, {n: linears[n] for n in statistics}, statistics)
            swaps.advance(block, index)
            enter = partial(swaps.enter, block=block, index=index)
            for names in groups:
                statistics[names[0]].complete(processes, names[0])
                units.append(_unit(names, options, linears, statistics[names[0]], layout, enter))
            swaps.leave(block, index)
        progress.step(f"sensitivity: block {index + 1} of {len(model)}")
    with model.outside(head=True) as whole:
        swaps.finish(whole)
        head_name = next((name for name in options if not any(name in unit.names for unit in units)), None)
        if head_name is not None:
            units.append(_head_unit(model, whole, head_name, options, streams, processes, layout, swaps))
    measured = swaps.measured(processes)
    units = [replace(u, measured={c: kl for (n, c), kl in measured.items() if n == u.names[0]}) for u in units]
    return _experts_together(units, model)


def _experts_together(units: list[Unit], model: StreamedModel) -> list[Unit]:
    """All experts of a model as one unit: readers take them by one scheme. What was measured of each adds up."""
    experts = {n for n, module in model.skeleton.named_modules() if isinstance(module, ExpertLinear)}
    own = [unit for unit in units if unit.names[0] in experts]
    if len(own) < 2:
        return units
    choices = [choice for choice in own[0].errors if all(choice in unit.errors for unit in own)]
    if not choices:
        raise InvalidValueError(
            "The experts share a choice, but have none in common; give them the same in budget.overrides."
        )
    measured = [choice for choice in choices if all(choice in unit.measured for unit in own)]
    whole = Unit(
        tuple(name for unit in own for name in unit.names),
        {c: {n: e for unit in own for n, e in unit.errors[c].items()} for c in choices},
        {choice: sum(unit.measured[choice] for unit in own) for choice in measured},
    )
    return [unit for unit in units if unit.names[0] not in experts] + [whole]


def _advance(
    model: StreamedModel,
    block: nn.Module,
    index: int,
    streams: Sequence[Stream],
    leaders: Mapping[str, nn.Module],
    statistics: Mapping[str, Statistics],
) -> list[Stream]:
    advanced = []
    for stream in streams:

        def seen(name: str, inputs: Tensor, batch: Batch = stream.batch) -> None:
            statistics[name].add(inputs, batch.mask_of(inputs))

        with watch_inputs(leaders, seen):
            advanced.append(stream.advanced(model.call(block, index, stream)))
    return advanced


def _head_unit(
    model: StreamedModel,
    whole: PreTrainedModel,
    name: str,
    options: Mapping[str, Options],
    streams: Sequence[Stream],
    processes: Processes,
    layout,
    swaps: Swaps,
) -> Unit:
    statistics, head = _empty(options, [name], model), whole.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    for stream in streams:
        inputs = model.head_input(whole, head, stream)
        statistics.add(inputs, stream.batch.mask_of(inputs))
    statistics.complete(processes, name)
    return _unit([name], options, {name: head}, statistics, layout, partial(swaps.enter_head, whole=whole))


def _empty(options: Mapping[str, Options], names: Sequence[str], model: StreamedModel) -> Statistics:
    tasks = [task for name in names for task in options[name].values()]
    cross = any(task.needs_dense_stream for task in tasks)  # zero on the dense model
    return Statistics(tasks[0].shape.in_features, model.device, cross=cross)


def _unit(
    names: Sequence[str],
    options: Mapping[str, Options],
    linears: Mapping[str, Linear],
    statistics: Statistics,
    layout,
    enter: Callable[[Swap], None],
) -> Unit:
    """Solve the unit once for every choice that all its linears have, and put its weights back; measure some."""
    dense = {name: linears[name].weight.detach().clone() for name in names}
    weights = {name: get_weight(linears[name]) for name in names}
    errors: dict[str, dict[str, Tensor]] = {}
    shared = [choice for choice in options[names[0]] if all(choice in options[name] for name in names)]
    if not shared:
        raise InvalidValueError(
            f"{' and '.join(names)} read the same tensor and so share a choice, but have none in common; give them the "
            "same choices in budget.overrides."
        )
    by_size = sorted(shared, key=lambda choice: _stored_bits(options[names[0]][choice]))
    for choice in shared:
        tasks = {name: options[name][choice] for name in names}
        errors[choice] = {}
        for name, quantized, _ in solve_group(tasks, {n: linears[n] for n in names}, statistics, layout):
            difference = weights[name] - layout.of(quantized.grid).values(quantized)
            errors[choice][name] = (difference @ statistics.gram).mul_(difference).sum(1).clamp_(min=0).cpu()
        if choice in (by_size[0], by_size[len(by_size) // 2]):
            enter((names[0], choice))
        for name in names:
            linears[name].weight.data.copy_(dense[name])
    return Unit(tuple(names), errors)


def _stored_bits(task: LinearTask) -> float:
    """Bits of a code and of its share of a scale."""
    return task.grid.bits + 8 * task.scale_dtype.itemsize / task.grid.columns(task.shape.in_features)
