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
"""What is open to choice in a recipe with a budget, and what every choice takes on disk; no weights are needed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hfcompress.errors import InvalidValueError, nearest
from hfcompress.evaluation.numbers import number
from hfcompress.models.names import ALL_LINEARS, matches
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.forecast import Forecast
from hfcompress.passes.plan import LinearTask, Plan, make_plan, untied_head
from hfcompress.recipes.base import Recipe
from hfcompress.recipes.budget import find_budget, parse_choice


class Choices:
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
        self.model, self.steps, self.layout = model, list(steps), layout
        head = untied_head(model) if self.budget.head else None
        if head is not None and not matches(head, self.step.ignore) and head not in self.step.targets:
            opened = dataclasses.replace(self.step, targets=(*self.step.targets, head))
            self.steps = [opened if step is self.step else step for step in self.steps]
            self.step = opened
        self.forecast = Forecast(model, layout)
        self.draft = make_plan(model, self._steps(dataclasses.replace(self.step, group_size=-1)), layout)
        if self.draft.embeddings is not None:
            raise InvalidValueError(
                f"A budget gives linears grids of their own, beside which quantized embeddings do not load; take "
                f"{self.draft.embeddings.name} out of targets."
            )
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
        self.require_reachable(least, most)

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
            grid = dataclasses.replace(task.grid, bits=bits, group_size=group_size)
            self.layout.check(task.shape, grid)
            settings: Any = task.settings
            options[choice] = dataclasses.replace(
                task, settings=dataclasses.replace(settings, bits=bits, group_size=group_size, overrides={}), grid=grid
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
        """The same as [`Choices.resolved`], without reading the recipe anew."""

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
        config = self.layout.quantization_config(grids, [])  # refuses what cannot be mixed
        if self.draft.unpacked:
            try:
                self.layout.config_unpacked(config, grids)
            except InvalidValueError as error:
                raise InvalidValueError(
                    "A budget gives linears grids of their own, and of this architecture transformers unpacks one alone; leave "
                    "budget out."
                ) from error

    def _size(self, plan: Plan) -> float:
        """A plan in the target's unit: bits per weight, or bytes."""
        if self.budget.target[0] == "target_bits":
            return self.forecast.bits_per_weight(plan.tasks.values())
        return self.forecast.output_bytes(plan)

    def require_reachable(self, least: Plan, most: Plan) -> None:
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
