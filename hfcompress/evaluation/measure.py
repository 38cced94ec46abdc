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
The measurements by their names. Each is a module of this package with `units(comparison)`, how many steps of progress
it takes, and `measure(comparison)`, what it found.
"""

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hfcompress.errors import HfcompressError, InvalidValueError, UnsupportedModelError, nearest
from hfcompress.evaluation.report import QUALITY, TASKS, Report


if TYPE_CHECKING:
    from hfcompress.evaluation.comparison import Comparison


ALL = "all"
BUNDLED_TASK = "continuation"
MEASUREMENTS = (QUALITY, TASKS, "speed", "memory", "energy", "robustness", "stability", "explain")


def chosen(names: Iterable[str]) -> tuple[str, ...]:
    """
    The measurements that `names` ask for, in the order in which they are taken.

    Raises:
        InvalidValueError: there is no such measurement; the nearest is named.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in (*MEASUREMENTS, ALL):
            known = (*MEASUREMENTS, ALL)
            raise InvalidValueError(
                f"There is no measurement '{name}'; there are {', '.join(known)}.{nearest(name, known)}"
            )
    return tuple(name for name in MEASUREMENTS if ALL in names or name in names)


def tasks_of(names: Iterable[str], tasks: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks that are run: those that are named, or the bundled one where tasks are asked for and none is named."""
    return tasks or ((BUNDLED_TASK,) if TASKS in chosen(names) else ())


def units(comparison: "Comparison", names: Iterable[str]) -> int:
    """Steps of progress that [`measure`] will report."""
    return sum(_module(name).units(comparison) for name in chosen(names))


def check(comparison: "Comparison", names: Iterable[str]) -> None:
    """
    Before any work: whether the measurements that were asked for by their names can be taken here.

    Raises:
        HfcompressError: one of them cannot.
    """
    for name in chosen(names):
        if ALL not in names:
            _require_text(comparison, name)
        if (ALL not in names or name == QUALITY) and hasattr(_module(name), "check"):
            _module(name).check(comparison)


def measure(comparison: "Comparison", names: Iterable[str]) -> Report:
    """
    Args:
        comparison (`Comparison`): the two models.
        names (`Iterable[str]`): of [`MEASUREMENTS`]; with `"all"` one that cannot be taken here is noted under
            `skipped`, otherwise its error is raised.

    Raises:
        HfcompressError: a measurement that was asked for cannot be taken.
    """
    names = [names] if isinstance(names, str) else list(names)
    report = Report()
    for name in chosen(names):
        try:
            _require_text(comparison, name)
            found = _module(name).measure(comparison)
        except HfcompressError as error:
            if ALL not in names or name == QUALITY:
                raise
            report.setdefault("skipped", {})[name] = str(error)
            comparison.progress.note(f"{name} was not measured: {error}")
            continue
        report.update(found if name == QUALITY else {name: found})
        if name == TASKS and found["recovery"] is not None:
            report["recovery"] = found["recovery"]
    return report


def _require_text(comparison: "Comparison", name: str) -> None:
    """All but quality needs a model that goes on with a text."""
    from hfcompress.models.architecture import goes_on, is_encoder  # transformers takes its time

    config = comparison.candidate.config
    if name != QUALITY and not goes_on(config):
        what = "is an encoder" if is_encoder(config) else "has an encoder beside its decoder"
        raise UnsupportedModelError(
            f"{comparison.candidate.name} {what}, of which nothing but quality is measured; leave {name} out of --measure."
        )


def _module(name: str):
    return importlib.import_module(f"hfcompress.evaluation.{name}")
