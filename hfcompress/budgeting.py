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
"""A budget settled: which of its choices every linear gets, and what that is expected to cost.

How it works: every linear that is open to choice is a task of the plan in each of its choices, and what those take on
disk follows from shapes. One walk over the dense model solves each unit in each choice, one backward pass weighs the
errors, and the allocation is a knapsack. What comes out is nothing but `overrides` of the quantizing step, so the pass
that follows knows nothing of budgets. A bound on KL is met by trials: the prediction's scale is corrected by what a real
pass measures on rows that it has not seen.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError, InvalidValueError, nearest
from hfcompress.evaluation.numbers import number
from hfcompress.models.names import ALL_LINEARS, matches
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.forecast import Forecast
from hfcompress.passes.plan import LinearTask, Plan, make_plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.sensitivity import Unit, mean_squared_gradients, unit_errors
from hfcompress.passes.swaps import corrected
from hfcompress.progress import Progress
from hfcompress.recipes.base import Recipe
from hfcompress.recipes.budget import find_budget, parse_choice
from hfcompress.solvers.allocation import allocate, frontier
from hfcompress.solvers.grid import Grid


GRADIENT_TOKENS = 2**14
SWAP_TOKENS = 2**12
TRIALS = 3
KEPT = 0.9  # a trial that comes this close to the bound is good enough
HELD_OUT = 4  # one row of so many is held out for the trials
HEADER_TRIES = 8
SHOWN = 16  # points of the curve that the manifest keeps

Trial = Callable[[Plan, Tokens, Tokens], float]  # a plan, rows to calibrate on, rows to measure on; KL in nats


class Budgeting:
    """
    A recipe with a budget, for one model.

    Args:
        model (`StreamedModel`): the model.
        steps (`Sequence[Recipe]`): the recipe's steps, the budget among them.
        layout: the format that will hold the result.

    Attributes:
        draft (`Plan`): which linears are compressed; bits and group sizes are still open.

    Raises:
        InvalidValueError: a pattern that means nothing, choices that fit no linear, a format in which all choices take
            the same bytes, or a target that cannot be met.
    """

    def __init__(self, model: StreamedModel, steps: Sequence[Recipe], layout):
        found = find_budget(steps)
        assert found is not None
        self.budget, self.step = found
        self.model, self.steps, self.layout = model, steps, layout
        self.forecast = Forecast(model, layout)
        self.draft = make_plan(model, self._steps(dataclasses.replace(self.step, group_size=-1)), layout)
        self.draft.needs_inputs = True
        self._check_patterns()
        self.options = {name: found for name in self.draft.tasks if (found := self._options(name))}
        if not self.options:
            raise InvalidValueError(
                f"None of budget.choices ({', '.join(self.budget.choices)}) fits a linear that is open to choice; give "
                "others, or check budget.targets and the overrides of the step behind it."
            )
        self._base = self.resolved({name: next(iter(options)) for name, options in self.options.items()})
        least, most = self._extremes()
        self._check_format(least, most)
        self._check_reachable(least, most)

    def _steps(self, step: Recipe) -> list[Recipe]:
        """The recipe's steps with another in place of the quantizing one, and without the budget."""
        return [step if s is self.step else s for s in self.steps if s is not self.budget]

    def _check_patterns(self) -> None:
        names = list(self.draft.tasks)
        for pattern in (*self.budget.targets, *self.budget.ignore, *self.budget.overrides):
            if pattern != ALL_LINEARS and not any(matches(name, (pattern,)) for name in names):
                hint = nearest(pattern, [*dict.fromkeys(n.rpartition(".")[2] for n in names), *names])
                raise InvalidValueError(f"budget: no linear that is compressed is called '{pattern}'.{hint}")

    def _options(self, name: str) -> dict[str, LinearTask]:
        """What would be done to a linear in each of its choices; nothing where it is not open."""
        task, own = self.draft.tasks[name], self.budget.for_linear(name)
        if own is None or self.step.for_linear(name) is None or self._changes(name).keys() & {"bits", "group_size"}:
            return {}
        options = {}
        for choice in own.choices:
            bits, group_size = parse_choice(choice)
            if group_size != -1 and task.shape.in_features % group_size:
                continue
            grid = Grid(bits, group_size, task.grid.symmetric)
            self.layout.check(name, grid, task.shape.transposed)
            settings: Any = task.settings
            options[choice] = dataclasses.replace(
                task, settings=dataclasses.replace(settings, bits=bits, group_size=group_size), grid=grid
            )
        return options

    def _changes(self, name: str) -> Mapping[str, Any]:
        """What the quantizing step's own overrides say of a linear."""
        return next((dict(c) for pattern, c in self.step.overrides.items() if matches(name, (pattern,))), {})

    # choices and their sizes

    def resolved(self, chosen: Mapping[str, str]) -> Plan:
        """The plan of the recipe in which the choices of linears, given by name, are overrides of the quantizing step."""
        overrides = {}
        for name, choice in chosen.items():
            bits, group_size = parse_choice(choice)
            overrides[name] = {**self._changes(name), "bits": bits, "group_size": group_size}
        step = dataclasses.replace(self.step, overrides={**overrides, **self.step.overrides})
        return make_plan(self.model, self._steps(step), self.layout)

    def plan(self, chosen: Mapping[str, str]) -> Plan:
        """The same as [`Budgeting.resolved`], without reading the recipe anew."""

        def put(tasks: Mapping[str, LinearTask]) -> dict[str, LinearTask]:
            return {n: self.options[n][chosen[n]] if n in chosen else task for n, task in tasks.items()}

        head = self._base.head
        return dataclasses.replace(
            self._base,
            blocks=[put(tasks) for tasks in self._base.blocks],
            head=None if head is None else put({head.name: head})[head.name],
        )

    def _extremes(self) -> tuple[Plan, Plan]:
        """The plans of fewest and of most bytes."""

        def extreme(pick: Callable) -> Plan:
            return self.plan(
                {
                    name: pick(options, key=lambda choice: self.forecast.linear_bytes(options[choice]))
                    for name, options in self.options.items()
                }
            )

        return extreme(min), extreme(max)

    def _check_format(self, least: Plan, most: Plan) -> None:
        if self._size(least) == self._size(most) and any(len(set(options)) > 1 for options in self.options.values()):
            raise InvalidValueError(
                f"In the format {self.layout.name} every choice of the budget takes the same bytes; write "
                "--set format=compressed-tensors."
            )
        grids = {name: task.grid for name, task in most.tasks.items()}
        grids |= dict(list({name: task.grid for name, task in least.tasks.items()}.items())[:1])
        self.layout.quantization_config(grids, [])  # refuses what cannot be mixed

    def _size(self, plan: Plan) -> float:
        """A plan in the target's unit: bits per weight, or bytes."""
        if self.budget.target[0] == "target_bits":
            return self.forecast.bits_per_weight(plan.tasks.values())
        return self.forecast.output_bytes(plan)

    def _check_reachable(self, least: Plan, most: Plan) -> None:
        key, target = self.budget.target
        if key == "target_kl" or self._size(least) <= target:
            return
        unit = "bytes" if key == "target_size" else "bits per weight"
        low, high = (number(self._size(plan), 6) for plan in (least, most))
        if key == "target_size":
            low, high = (f"{self._size(plan):,}" for plan in (least, most))
        raise InvalidValueError(
            f"budget.{key} is {target:,}, and with these choices the least is {low} {unit} and the most {high}; give at "
            "least that, or choices of fewer bits."
        )

    # settling

    def settle(
        self, tokens: Tokens, seed: int, processes: Processes, progress: Progress, batch_rows: int, trial: Trial
    ) -> dict[str, Any]:
        """
        Args:
            tokens (`Tokens`): the calibration data.
            seed (`int`): of the labels that the gradients are of.
            processes (`Processes`): who takes part.
            progress (`Progress`): is told of every block.
            batch_rows (`int`): rows that go through the model together.
            trial (`Trial`): runs a plan for real and measures it.

        Returns:
            `dict`: for the manifest: `target`; `overrides` (linear -> bits and group size); `units` (their linears, the
            choice, and for every choice `bytes`, `kl`, nats per token, `second_order_kl`, what the gradients alone
            predict, and where it was measured `measured_kl`); `curve` (the best by size) and `uniform`
            (every choice for all linears), each of `size_bytes`, `bits_per_weight` and `kl`; `chosen`, likewise, with
            `bound`, the loss below which no choice of these units can go at that size; and `trials`.

        Raises:
            InvalidValueError: the target cannot be met.
            CalibrationError: `target_kl` has no rows to hold out.
        """
        seen, held_out = tokens, None
        if self.budget.target[0] == "target_kl":
            seen, held_out = _divided(tokens)
        units = self._units(seen, seed, processes, progress, batch_rows)
        table = _Table(self, units)
        if held_out is None:
            chosen, trials = table.within_size(progress), []
        else:
            chosen, trials = table.within_kl(seen, held_out, trial, progress)
        return table.described(chosen, trials)

    def _units(
        self, tokens: Tokens, seed: int, processes: Processes, progress: Progress, batch_rows: int
    ) -> list[tuple[Unit, dict[str, float]]]:
        """The units, and what each choice would cost them."""
        share = processes.share(len(tokens.input_ids))
        batches = tokens.batch(share).split(batch_rows) if share.stop > share.start else []
        few, share = self._few(tokens, SWAP_TOKENS, processes)
        swapped = few.batch(share).split(batch_rows) if share.stop > share.start else []
        units = unit_errors(self.model, self.options, self.layout, batches, swapped, processes, progress)
        progress.step("sensitivity: gradients", amount=0)
        few, share = self._few(tokens, GRADIENT_TOKENS, processes)
        batch = few.batch(share) if share.stop > share.start else None
        widths = {name: next(iter(own.values())).shape.out_features for name, own in self.options.items()}
        gradients = mean_squared_gradients(self.model, widths, batch, share.start, seed, processes)
        progress.step("sensitivity: gradients", amount=len(self.model))
        on_cpu = {name: gradient.cpu() for name, gradient in gradients.items()}
        return [(unit, unit.predicted(on_cpu)) for unit in units]

    def _few(self, tokens: Tokens, most: int, processes: Processes) -> tuple[Tokens, slice]:
        """About so many tokens, evenly spread, and this process's share of their rows."""
        few = _spread(tokens, max(1, most // tokens.input_ids.shape[1]))
        return few, processes.share(len(few.input_ids))


class _Table:
    """Units by choices: what each takes and costs."""

    def __init__(self, budgeting: Budgeting, units: list[tuple[Unit, dict[str, float]]]):
        self.budgeting, self.forecast = budgeting, budgeting.forecast
        self.units = [unit for unit, _ in units]
        self.choices = list(dict.fromkeys(choice for unit in self.units for choice in unit.errors))
        self.predicted = [own for _, own in units]
        losses = [corrected(own, unit.measured) for unit, own in units]
        self.losses = torch.tensor([[own.get(c, float("inf")) for c in self.choices] for own in losses]).double()
        self.bytes = torch.tensor([[self._bytes(unit, c) for c in self.choices] for unit in self.units]).double()
        self._sizes: dict[tuple[int, ...], int] = {}

    def _bytes(self, unit: Unit, choice: str) -> int:
        options = self.budgeting.options
        return sum(self.forecast.linear_bytes(options[n][choice]) for n in unit.names if choice in unit.errors)

    # choosing

    def within_size(self, progress: Progress) -> Tensor:
        """The choices of least loss within the bytes, or the bits per weight, that are allowed."""
        key, target = self.budgeting.budget.target
        if key == "target_bits":
            tasks = self.budgeting.draft.tasks.values()
            weights = sum(task.shape.out_features * task.shape.in_features for task in tasks)
            target = target * weights / 8
        best = frontier(self.losses, self.bytes).choices
        margin = self._measure(key, best[0]) - self._payload(best[0])  # what is not open to choice
        if self._measure(key, best[-1]) <= target:
            if self._measure(key, best[-1]) < target:
                progress.note(
                    f"everything fits at the best choice: {self._size(best[-1]):,} bytes, which is less than is allowed"
                )
            return best[-1]
        for _ in range(HEADER_TRIES):
            chosen = allocate(self.losses, self.bytes, target - margin)
            excess = None if chosen is None else self._measure(key, chosen) - target
            if chosen is not None and excess is not None and excess <= 0:
                return chosen
            margin += max(excess or 0, 1)  # headers differ by the digits of the numbers in them
        self.budgeting._check_reachable(*[self.plan(best[0])] * 2)
        return best[0]

    def within_kl(self, seen: Tokens, held_out: Tokens, trial: Trial, progress: Progress) -> tuple[Tensor, list]:
        """The smallest choices that are expected to keep the bound, and the trials that the expectation rests on."""
        bound, scale = self.budgeting.budget.target[1], 1.0
        kept: dict[float, Tensor] = {}  # bytes -> choices that were measured to keep the bound
        trials: list[dict[str, float]] = []
        for number_ in range(TRIALS):
            chosen = allocate(self.bytes, self.losses, bound / scale)  # loss and size have changed their places
            if chosen is None:
                chosen = frontier(self.losses, self.bytes).choices[-1]
            progress.step(f"trial {number_ + 1} of at most {TRIALS}", amount=0)
            measured, predicted = trial(self.plan(chosen), seen, held_out), self._loss(chosen)
            trials.append({"size_bytes": self._size(chosen), "kl": predicted, "measured_kl": measured})
            if measured <= bound:
                kept[self._size(chosen)] = chosen
            if KEPT * bound <= measured <= bound:
                break
            scale = measured / max(predicted, 1e-300)
        if not kept:
            least = min(found["measured_kl"] for found in trials)
            raise InvalidValueError(
                f"budget.target_kl is {bound:g}, but the closest of {len(trials)} trials left {least:.3g} nats; allow "
                "that, or give choices of more bits."
            )
        return kept[min(kept)], trials

    # describing

    def names(self, chosen: Tensor) -> dict[str, str]:
        """Linear -> choice."""
        picked = [self.choices[c] for c in chosen.tolist()]
        return {name: choice for unit, choice in zip(self.units, picked, strict=True) for name in unit.names}

    def plan(self, chosen: Tensor) -> Plan:
        return self.budgeting.plan(self.names(chosen))

    def _payload(self, chosen: Tensor) -> float:
        return self.bytes.gather(1, chosen[:, None]).sum().item()

    def _loss(self, chosen: Tensor) -> float:
        return self.losses.gather(1, chosen[:, None]).sum().item()

    def _size(self, chosen: Tensor) -> int:
        key = tuple(chosen.tolist())
        if key not in self._sizes:
            self._sizes[key] = self.forecast.output_bytes(self.plan(chosen))
        return self._sizes[key]

    def _measure(self, key: str, chosen: Tensor) -> float:
        """Bytes of the folder, or of the compressed linears."""
        if key == "target_size":
            return self._size(chosen)
        return sum(self.forecast.linear_bytes(task) for task in self.plan(chosen).tasks.values())

    def _point(self, chosen: Tensor) -> dict[str, float]:
        bits = self.forecast.bits_per_weight(self.plan(chosen).tasks.values())
        return {"size_bytes": self._size(chosen), "bits_per_weight": bits, "kl": self._loss(chosen)}

    def described(self, chosen: Tensor, trials: list[dict[str, float]]) -> dict[str, Any]:
        """See [`Budgeting.settle`]."""
        hull = frontier(self.losses, self.bytes)
        shown = np.unique(np.linspace(0, len(hull.sizes) - 1, SHOWN).round().astype(int))
        uniform = {c: torch.full_like(chosen, i) for i, c in enumerate(self.choices)}
        key, target = self.budgeting.budget.target
        units = []
        rows = zip(self.units, self.predicted, self.losses, self.bytes, chosen.tolist(), strict=True)
        for unit, predicted, losses, sizes, choice in rows:
            options = {
                c: {"bytes": int(sizes[i]), "kl": losses[i].item(), "second_order_kl": predicted[c]}
                for i, c in enumerate(self.choices)
                if c in unit.errors
            }
            for c, measured in unit.measured.items():
                options[c]["measured_kl"] = measured
            units.append({"linears": list(unit.names), "choice": self.choices[choice], "choices": options})
        names = self.names(chosen)
        return {
            "target": {key: target},
            "overrides": {
                n: dict(zip(("bits", "group_size"), parse_choice(c), strict=True)) for n, c in names.items()
            },
            "chosen": {**self._point(chosen), "bound": hull.bound(self._payload(chosen))},
            "curve": [self._point(hull.choices[i]) for i in shown],
            "uniform": {c: self._point(own) for c, own in uniform.items() if self._loss(own) < float("inf")},
            "units": units,
            "trials": trials,
        }


def plan_of(budgeting: Budgeting, settled: Mapping[str, Any]) -> Plan:
    """The plan that a settled budget stands for."""
    return budgeting.resolved({n: f"{own['bits']}g{own['group_size']}" for n, own in settled["overrides"].items()})


def _spread(tokens: Tokens, rows: int) -> Tokens:
    """At most so many rows, evenly spread."""
    count = len(tokens.input_ids)
    return _rows(tokens, np.unique(np.linspace(0, count - 1, min(rows, count)).round().astype(int)))


def _divided(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Rows to choose by, and rows to measure on."""
    count = len(tokens.input_ids)
    if count < 2:
        raise CalibrationError(
            "budget.target_kl measures on rows that it does not calibrate on, and there is one row; give more --samples."
        )
    measured = np.arange(count) % HELD_OUT == min(HELD_OUT, count) - 1
    return _rows(tokens, np.flatnonzero(~measured)), _rows(tokens, np.flatnonzero(measured))


def _rows(tokens: Tokens, rows: np.ndarray) -> Tokens:
    mask = None if tokens.mask is None else tokens.mask[rows]
    return dataclasses.replace(tokens, input_ids=tokens.input_ids[rows], mask=mask)
