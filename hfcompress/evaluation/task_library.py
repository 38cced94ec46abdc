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
lm-eval's tasks by their names, from files, and those that come with this package.

Importing this module imports lm-eval, so [`hfcompress.evaluation.tasks`] does it when tasks were asked for.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from hfcompress.errors import CalibrationError, InvalidValueError, MissingExtraError, nearest
from hfcompress.evaluation import continuation
from hfcompress.evaluation.harness import quiet, reason, seeded


def load(names: Iterable[str], seed: int) -> dict[str, TaskDict]:
    """
    Args:
        names (`Iterable[str]`): lm-eval's names of tasks, groups or tags; paths of task files (`.yaml`), whose
            `!function`s are run, as lm-eval does; [`continuation.NAMES`].
        seed (`int`): for tasks that draw while they read their documents.

    Returns:
        `dict`: for each name lm-eval's `{"tasks": {name: Task}, "groups": {name: Group}, ...}`, ready to be run.

    Raises:
        InvalidValueError: an unknown name, or a task file that is missing or broken.
        CalibrationError: a task's data cannot be had.
        MissingExtraError: a task needs a package that is not installed.
    """
    library = functools.cache(TaskManager)  # reads thousands of files, so only where a name needs it
    suites: dict[str, TaskDict] = {}
    for name in dict.fromkeys(names):
        with quiet(), seeded(seed):
            suite = _loaded(name, library)
        for task in suite["tasks"].values():
            _check_metrics(task)
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
        for other, loaded in suites.items():
            if twice := sorted(suite["tasks"].keys() & loaded["tasks"].keys()):
                raise InvalidValueError(
                    f"Both '{other}' and '{name}' hold the task '{twice[0]}'; ask for one of them."
                )
        suites[name] = suite
    return suites


def _loaded(name: str, library: Callable[[], TaskManager]) -> TaskDict:
    if name in continuation.NAMES:
        return TaskManager(include_defaults=False).load(continuation.config(name))
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        manager, asked = _from_file(path)
    elif name in library().task_index:
        manager, asked = library(), name
    else:
        raise InvalidValueError(
            f"There is no task '{name}'; give a name of lm-eval's, the path of a task's .yaml file, or 'continuation'."
            f"{nearest(name, (*continuation.NAMES, *library().all_tasks))}"
        )
    try:
        return manager.load(asked)
    except ImportError as error:
        raise MissingExtraError(f"The task '{name}' needs a package that is not here: {reason(error)}") from error
    except OSError as error:  # what `datasets` raises for data that is not there and for a Hub out of reach
        raise CalibrationError(
            f"The data of the task '{name}' cannot be had ({reason(error)}); connect to the Hub once, or give a task "
            "file whose data is local."
        ) from error
    except Exception as error:  # a task file can run anything, so anything can go wrong in it
        raise InvalidValueError(f"The task '{name}' cannot be loaded: {reason(error)}") from error


def _from_file(path: Path) -> tuple[TaskManager, str]:
    """What loads it, and what to ask for there."""
    if not path.is_file():
        raise InvalidValueError(f"There is no task file {path}; give the path of a task's .yaml file.")
    group = re.search(r"^group\s*:\s*['\"]?([^'\"\s#]+)", path.read_text(), re.MULTILINE)
    if group is None:  # the folder may be large, and only groups name their neighbours
        return TaskManager(include_defaults=False), str(path)
    return TaskManager(include_path=path.parent, include_defaults=False), group[1]


def _check_metrics(task: Task) -> None:
    """lm-eval looks for a metric that it does not know on the Hub, and goes on without it where that fails."""
    for metric, function in getattr(task, "_metric_fn_list", {}).items():
        if function is None and task.get_config("process_results") is None:
            raise CalibrationError(
                f"The metric '{metric}' of the task '{task.task_name}' is not lm-eval's own and cannot be fetched with "
                "`evaluate`; connect to the Hub once, or give it as a function (metric: !function module.name)."
            )


class _OtherOrder(ContextSampler):
    """The few-shot examples that a sampler gives, in another order than it gives them in."""

    def __init__(self, sampler: ContextSampler):
        super().__init__()
        self.sampler = sampler

    def sample(self, n, *arguments, **options):
        """`n` examples; never in the order in which they were drawn."""
        drawn = list(self.sampler.sample(n, *arguments, **options))
        order = list(range(n))
        while order == sorted(order):
            self.rnd.shuffle(order)
        return [drawn[i] for i in order]

    def set_rnd(self, rnd):
        """Seeds both what is drawn and the order."""
        self.sampler.set_rnd(rnd)
        return super().set_rnd(rnd)


def with_shuffled_examples(suite: TaskDict) -> TaskDict | None:
    """The same tasks and the same few-shot examples in another order; `None` where a task has fewer than two."""
    shuffled: dict[str, Task] = {}
    for name, task in suite["tasks"].items():
        if not isinstance(task, ConfigurableTask) or (task.config.num_fewshot or 0) < 2:
            return None
        other = copy.copy(task)
        other.sampler = _OtherOrder(task.sampler)
        shuffled[name] = other
    return {**suite, "tasks": shuffled}
