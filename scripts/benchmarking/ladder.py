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
"""The steps of quantization, added one at a time."""

from dataclasses import dataclass
from typing import Any

from benchmarking.bench import Setting


DAMPING = {2: 0.1, 3: 0.03, 4: 0.03}  # where the column sweep has the full recipe around it
TUNE_ITERATIONS = 40
ADDED = ("awq", "rotate", "tune", "qat")  # steps with rungs of their own: no other rung rests on them
WHOLE = "+ damping"


@dataclass(frozen=True)
class Rung:
    """
    Args:
        label (`str`): what the table calls it.
        base (`str` or `None`): the label of the rung that it adds something to.
        recipe (`list[dict]`): its steps, as in YAML.
    """

    label: str
    base: str | None
    recipe: list[dict[str, dict[str, Any]]]


def ladder(setting: Setting, seed: int = 0, without: tuple[str, ...] = ()) -> list[Rung]:
    """
    Every rung holds one thing more than its base; the last ones are each added to the same base.

    Args:
        setting (`Setting`): the grid.
        seed (`int`, *optional*, defaults to 0): of the steps that draw something.
        without (`tuple[str, ...]`, *optional*): steps whose rungs are left out.
    """
    grid = {"bits": setting.bits, "group_size": setting.group_size}
    minmax, searched = grid | {"scales": "minmax"}, grid
    rungs = [
        Rung("RTN", None, [{"rtn": minmax}]),
        Rung("RTN, scale search", "RTN", [{"rtn": searched}]),
        Rung("AWQ, RTN, scale search", "RTN, scale search", [{"awq": {}}, {"rtn": searched}]),
        Rung("GPTQ", "RTN", [{"gptq": minmax | {"act_order": False}}]),
        Rung("+ act_order", "GPTQ", [{"gptq": minmax}]),
        Rung("+ scale search", "+ act_order", [{"gptq": searched}]),
    ]
    whole = dict(searched)
    for label, key, value in (
        ("+ shift", "shift", 1.0),
        ("+ refine", "refine", 3),
        ("+ curvature", "curvature", True),
        (WHOLE, "damping", DAMPING.get(setting.bits, 0.01)),
    ):
        whole = whole | {key: value}
        rungs.append(Rung(label, rungs[-1].label, [{"gptq": whole}]))
    gptq = {"gptq": whole}
    rungs += [
        Rung("all that, awq first", WHOLE, [{"awq": {}}, gptq]),
        Rung("all that, rotate first", WHOLE, [{"rotate": {"when": "always", "seed": seed}}, gptq]),
        Rung("all that, tune last", WHOLE, [gptq, {"tune": {"iterations": TUNE_ITERATIONS, "seed": seed}}]),
        Rung("all that, qat last", WHOLE, [gptq, {"qat": {"train": "scales", "seed": seed}}]),
    ]
    return [rung for rung in rungs if not any(name in without for step in rung.recipe for name in step)]


def by_default(rungs: list[Rung]) -> set[str]:
    """The labels whose steps the shipped recipes have: the whole one and what it rests on."""
    bases = {rung.label: rung.base for rung in rungs}
    found: set[str] = set()
    label: str | None = WHOLE
    while label in bases:
        found.add(label)
        label = bases[label]
    return found
