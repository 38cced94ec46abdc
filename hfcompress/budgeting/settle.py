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
"""From a target to the choice of every linear: sensitivities, an allocation, and where KL is bounded, trials."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hfcompress.budgeting.choices import Choices
from hfcompress.budgeting.table import Table, Trial
from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError
from hfcompress.passes.plan import Plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.sensitivity import Unit, mean_squared_gradients, unit_errors
from hfcompress.progress import Progress


GRADIENT_TOKENS = 2**14
SWAP_TOKENS = 2**12
HELD_OUT = 4  # one row of so many is held out for the trials


def settle(
    choices: Choices,
    tokens: Tokens,
    seed: int,
    processes: Processes,
    progress: Progress,
    batch_rows: int,
    trial: Trial,
) -> dict[str, Any]:
    """
    Args:
        choices (`Choices`): what is open.
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
    if choices.budget.target[0] == "target_kl":
        seen, held_out = _divided(tokens)
    units = _units(choices, seen, seed, processes, progress, batch_rows)
    table = Table(choices, units)
    if held_out is None:
        chosen, trials = table.within_size(progress), []
    else:
        chosen, trials = table.within_kl(seen, held_out, trial, progress)
    return table.described(chosen, trials)


def _units(
    choices: Choices, tokens: Tokens, seed: int, processes: Processes, progress: Progress, batch_rows: int
) -> list[tuple[Unit, dict[str, float]]]:
    """The units, and what each choice would cost them."""
    share = processes.share(len(tokens.input_ids))
    batches = tokens.batch(share).split(batch_rows) if share.stop > share.start else []
    few, share = _few(tokens, SWAP_TOKENS, processes)
    swapped = few.batch(share).split(batch_rows) if share.stop > share.start else []
    units = unit_errors(choices.model, choices.options, choices.layout, batches, swapped, processes, progress)
    progress.step("sensitivity: gradients", amount=0)
    few, share = _few(tokens, GRADIENT_TOKENS, processes)
    batch = few.batch(share) if share.stop > share.start else None
    widths = {name: next(iter(own.values())).shape.out_features for name, own in choices.options.items()}
    gradients = mean_squared_gradients(choices.model, widths, batch, share.start, seed, processes)
    progress.step("sensitivity: gradients", amount=len(choices.model))
    on_cpu = {name: gradient.cpu() for name, gradient in gradients.items()}
    return [(unit, unit.predicted(on_cpu)) for unit in units]


def _few(tokens: Tokens, most: int, processes: Processes) -> tuple[Tokens, slice]:
    """About so many tokens, evenly spread, and this process's share of their rows."""
    few = _spread(tokens, max(1, most // tokens.length))
    return few, processes.share(len(few.input_ids))


def plan_of(choices: Choices, settled: Mapping[str, Any]) -> Plan:
    """The plan that a settled budget stands for."""
    return choices.resolved({n: f"{own['bits']}g{own['group_size']}" for n, own in settled["overrides"].items()})


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
    return tokens.rows(rows)
