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
"""Linears that read the same tensor, solved together, and what there is to report of each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfcompress.models.roles import Linear, get_weight, set_weight
from hfcompress.passes.plan import LinearTask
from hfcompress.passes.statistics import PANEL, Statistics
from hfcompress.solvers.grid import QuantizedWeight


def solve_group(
    tasks: dict[str, LinearTask],
    linears: dict[str, Linear],
    statistics: Statistics | None,
    layout,
    curvatures: Mapping[str, list[Tensor]] | None = None,
):
    """
    Solve linears that read the same tensor, those with the same settings stacked, and put their new weights in.

    Args:
        tasks (`dict[str, LinearTask]`): name -> what to do.
        linears (`dict[str, nn.Module]`): name -> module.
        statistics (`Statistics` or `None`): of their common input.
        layout: the format, which knows what a reader will make of the codes.
        curvatures (`Mapping[str, list[Tensor]]`, *optional*): what the outputs are worth, for steps that ask for it.

    Returns:
        `list`: (name, quantized weight, what to report) for each linear.
    """
    solved = []
    for same in _alike(tasks):
        weights = [get_weight(linears[task.name]) for task in same]
        first = same[0]
        label = " and ".join(task.name for task in same)
        worth = None
        if curvatures and first.needs_curvature and all(task.name in curvatures for task in same):
            worth = [block for task in same for block in curvatures[task.name]]
        stacked, details = _solve(first, torch.cat(weights), statistics, label, worth)
        start = 0
        for task, weight in zip(same, weights, strict=True):
            quantized = stacked.rows(start, start + len(weight))
            start += len(weight)
            values = layout.of(task.grid).values(quantized)
            set_weight(linears[task.name], values)
            solved.append((task.name, quantized, _report(task, weight, values, statistics, details)))
    return solved


def _solve(
    task: LinearTask, weight: Tensor, statistics: Statistics | None, label: str, worth: list[Tensor] | None
) -> tuple[QuantizedWeight, dict[str, Any]]:
    """Sparsify a weight, or round it, or both."""
    if statistics is None and task.settings.needs_inputs:
        statistics = Statistics.even(task.shape.in_features, weight.device)
    keep, found = None, {}
    if task.sparsity is not None:
        weight, keep, found = task.sparsity.sparsify(weight, statistics, label, worth)
        weight = weight.masked_fill(~keep, 0.0)  # and no minus zero
    if task.grid.is_plain:
        scales = torch.ones(len(weight), 1, dtype=task.scale_dtype, device=weight.device)
        return QuantizedWeight(weight.to(task.scale_dtype), scales, None, task.grid), found
    worth = worth if task.settings.needs_curvature else None
    shared = {} if task.base is None else {"base": task.base.read().float().to(weight.device)}
    quantized, details = task.settings.quantize(
        weight,
        statistics,
        task.grid,
        task.scale_dtype,
        label,
        worth,
        **({} if keep is None else {"keep": keep}),
        **shared,
    )
    fallback = details.get("fallback") or found.get("fallback")
    return quantized, {**found, **details, "fallback": fallback}


def _alike(tasks: dict[str, LinearTask]) -> list[list[LinearTask]]:
    """Tasks with equal settings, together."""
    groups: list[list[LinearTask]] = []
    for task in tasks.values():
        for group in groups:
            other = group[0]
            if treatment(task) == treatment(other):
                group.append(task)
                break
        else:
            groups.append([task])
    return groups


def treatment(task: LinearTask) -> tuple[Any, ...]:
    """What is done to a linear; those for which it is equal are solved as one where they read the same tensor."""
    alone = (
        task.name if getattr(task.settings, "alone", False) else None
    )  # what it finds is for all rows of one weight
    return task.settings, task.sparsity, task.grid, task.scale_dtype, alone


def _report(
    task: LinearTask, weight: Tensor, values: Tensor, statistics: Statistics | None, details: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": task.name,
        "method": "+".join(dict.fromkeys(step.name for step in (task.sparsity, task.settings) if step is not None)),
        "bits": task.grid.bits_on_average,
        "group_size": None if task.grid.is_plain else task.grid.group_size,
        "symmetric": task.grid.symmetric,
        "type": task.grid.type,
        "activations": task.grid.activations,
        "shape": [task.shape.out_features, task.shape.in_features],
        **errors(weight, values, statistics),
        "tokens": statistics.tokens if statistics is not None else 0,
        **details,
        "fallback": task.fallback or details.get("fallback") or _unseen(statistics),
    }


def _unseen(statistics: Statistics | None) -> str | None:
    """What there is to say of an expert that no token was sent to."""
    if statistics is None or statistics.tokens:
        return None
    return "no calibration token was sent to this expert, so it was solved on others of its block"


def quadratic_trace(rows: Tensor, gram: Tensor) -> Tensor:
    """
    `tr(A H A^T)`, by half of the products that `A H` takes: `H` and `A^T A` are symmetric.

    Args:
        rows (`Tensor`): `A`, float32 `(rows, columns)`.
        gram (`Tensor`): `H`, float32 `(columns, columns)`.

    Returns:
        `Tensor`: float64, one number.
    """
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, len(gram), PANEL):
        stop = min(start + PANEL, len(gram))
        products = (rows[:, start:].T @ rows[:, start:stop]).mul_(gram[start:, start:stop])
        total += 2 * products.sum(dtype=torch.float64) - products[: stop - start].sum(dtype=torch.float64)
    return total


def errors(weight: Tensor, values: Tensor, statistics: Statistics | None) -> dict[str, Any]:
    """How far the rounded values of a weight are from it, and its outputs from what they were."""
    difference = weight - values
    output_error = None
    if statistics is not None:
        lost, whole = (quadratic_trace(each, statistics.gram).clamp_(min=0) for each in (difference, weight))
        output_error = (lost / whole).sqrt().item() if whole > 0 else 0.0
    return {
        "sparsity": (values == 0).float().mean().item(),
        "relative_output_error": output_error,
        "relative_weight_error": (difference.norm() / weight.norm().clamp(min=1e-30)).item(),
    }
