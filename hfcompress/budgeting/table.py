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
"""Units by choices: what each takes and costs, which are chosen, and how that is told."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfcompress.budgeting.choices import Choices
from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import InvalidValueError
from hfcompress.passes.plan import Plan
from hfcompress.passes.sensitivity import Unit
from hfcompress.passes.swaps import corrected
from hfcompress.progress import Progress
from hfcompress.recipes.budget import parse_choice
from hfcompress.solvers.allocation import allocate, frontier


TRIALS = 3
KEPT = 0.9  # a trial that comes this close to the bound is good enough
HEADER_TRIES = 8
SHOWN = 16  # points of the curve that the manifest keeps

Trial = Callable[[Plan, Tokens, Tokens], float]  # a plan, rows to calibrate on, rows to measure on; KL in nats


class Table:
    """Units by choices: what each takes and costs."""

    def __init__(self, open_: Choices, units: list[tuple[Unit, dict[str, float]]]):
        self.open, self.forecast = open_, open_.forecast
        self.units = [unit for unit, _ in units]
        self.choices = list(dict.fromkeys(choice for unit in self.units for choice in unit.errors))
        self.predicted = [own for _, own in units]
        losses = [corrected(own, unit.measured) for unit, own in units]
        self.losses = torch.tensor([[own.get(c, float("inf")) for c in self.choices] for own in losses]).double()
        self.bytes = torch.tensor([[self._bytes(unit, c) for c in self.choices] for unit in self.units]).double()
        self._sizes: dict[tuple[int, ...], int] = {}

    def _bytes(self, unit: Unit, choice: str) -> int:
        options = self.open.options
        return sum(self.forecast.linear_bytes(options[n][choice]) for n in unit.names if choice in unit.errors)

    # choosing

    def within_size(self, progress: Progress) -> Tensor:
        """The choices of least loss within the bytes, or the bits per weight, that are allowed."""
        key, target = self.open.budget.target
        best = frontier(self.losses, self.bytes).choices
        if key == "target_bits":
            shapes = [task.shape for task in self.plan(best[0]).tasks.values()]
            target = target * sum(shape.out_features * shape.in_features for shape in shapes) / 8
        self.open.require_reachable(self.plan(best[0]), self.plan(best[-1]))
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
        return best[0]

    def within_kl(self, seen: Tokens, held_out: Tokens, trial: Trial, progress: Progress) -> tuple[Tensor, list]:
        """The smallest choices that are expected to keep the bound, and the trials that the expectation rests on."""
        bound, scale = self.open.budget.target[1], 1.0
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
        return self.open.plan(self.names(chosen))

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
        """See [`hfcompress.budgeting.settle.settle`]."""
        hull = frontier(self.losses, self.bytes)
        shown = np.unique(np.linspace(0, len(hull.sizes) - 1, SHOWN).round().astype(int))
        uniform = {c: torch.full_like(chosen, i) for i, c in enumerate(self.choices)}
        key, target = self.open.budget.target
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
