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
"""Tasks with right and wrong answers, by lm-eval: the same documents for the original and for what was made of it."""

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from hfcompress.errors import InvalidValueError, MissingExtraError
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.task_scores import Run, compared, has_contexts, main_metric, merged, rows_of, value_of


SHUFFLED = "shuffled_few_shot"


def units(comparison: Comparison) -> int:
    """Steps of progress: as many for a task on a model as it has blocks."""
    return 2 * comparison.blocks * len(dict.fromkeys(comparison.tasks))


def check(comparison: Comparison) -> None:
    """
    Raises:
        HfcompressError: lm-eval, a task or its data cannot be had here.
    """
    _, task_library = _lm_eval()
    task_library.load(_names(comparison), comparison.seed)


def measure(comparison: Comparison) -> dict[str, Any]:
    """
    Returns:
        `dict`: `scores` by task (a group of tasks with a common score is one), each with its main `metric`, both
        models' values and standard errors, `recovery` (compressed / baseline, where higher is better), `flips` (the
        share of documents of which the correctness changed, for generation the answer), `documents` and all other
        `metrics`; `recovery`, the mean of theirs; and `how`.

    Raises:
        InvalidValueError: no task is asked for, there is no such task, or it cannot be run.
        CalibrationError: a task's data or metric cannot be had here.
        CheckpointError: a model has no tokenizer.
        MissingExtraError: lm-eval is not installed.
    """
    harness, task_library = _lm_eval()
    suites = task_library.load(_names(comparison), comparison.seed)
    runs: dict[str, dict[str, Run]] = {}
    context: dict[str, dict[str, int]] = {}
    for label, checkpoint in comparison.models:
        with harness.task_model(comparison, checkpoint) as lm:
            runs[label] = {}
            for name, suite in suites.items():
                steps = _Steps(comparison.progress.step, comparison.blocks, f"tasks: {name}, {label}", suite)
                lm.answered = steps.answered
                runs[label][name] = harness.run(lm, suite, comparison)
                steps.finish()
            context[label] = {"tokens": lm.max_length, "requests_cut_to_it": lm.truncated}
            del lm  # or it would outlive the loading of the next one
    scores = {
        row: compared(row, leaves, suite, runs["baseline"][name], runs["compressed"][name])
        for name, suite in suites.items()
        for row, leaves in rows_of(suite).items()
    }
    recoveries = [score["recovery"] for score in scores.values() if score["recovery"] is not None]
    return {
        "scores": scores,
        "recovery": sum(recoveries) / len(recoveries) if recoveries else None,
        "how": {
            "lm_eval": importlib.metadata.version("lm-eval"),
            "versions": merged(runs["baseline"], "versions"),
            "num_fewshot": merged(runs["baseline"], "n-shot"),
            "limit": comparison.limit,
            "seed": comparison.seed,
            "standard_errors": "lm-eval's: closed form for means, otherwise from "
            f"{harness.BOOTSTRAPS} resamplings (100 at most for BLEU, chrF and TER), null where it has neither",
            "flips": "documents of which the correctness changed, for generation the answer; null where a document's "
            "score is neither 0 nor 1",
            "batch": f"at most {harness.MAX_ROWS} rows, {harness.GENERATED_ROWS} where text is generated",
            "context": context,
            "chat_template": False,
            "dtype": str(comparison.dtype).removeprefix("torch."),
            "device": str(comparison.device),
        },
    }


def scores_under(
    comparison: Comparison,
    perturbations: Mapping[str, Callable[[str], str]],
    shuffled: bool,
    step: Callable[[str], object] = lambda description: None,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """
    The tasks' main metrics when what the models read is disturbed; each model is loaded once.

    Args:
        comparison (`Comparison`): the two models, and the tasks.
        perturbations (`Mapping[str, Callable[[str], str]]`): by condition, what happens to every context: everything
            before the answer, few-shot examples included. Texts of which the perplexity is taken have none, so such
            tasks are left out; so are conditions without tasks.
        shuffled (`bool`): have the condition `shuffled_few_shot` too: the same examples in another order, for tasks
            with at least two.
        step (`Callable[[str], object]`, *optional*): told what is done, [`units`] times for each condition.

    Returns:
        `dict`: `{condition: {task: {"baseline": x, "compressed": y}}}`.

    Raises:
        HfcompressError: as [`measure`].
    """
    harness, task_library = _lm_eval()
    suites = task_library.load(_names(comparison), comparison.seed)
    read = {name: suite for name, suite in suites.items() if has_contexts(suite)}
    conditions: dict[str, tuple[Callable[[str], str] | None, dict[str, Any]]] = {
        name: (functools.cache(change), read) for name, change in perturbations.items()
    }
    if shuffled:
        reordered = {name: task_library.with_shuffled_examples(suite) for name, suite in suites.items()}
        conditions[SHUFFLED] = (None, {name: suite for name, suite in reordered.items() if suite is not None})
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for label, checkpoint in comparison.models:
        with harness.task_model(comparison, checkpoint) as lm:
            for condition, (change, chosen) in conditions.items():
                lm.perturb = change
                for name in suites:
                    suite = chosen.get(name, suites[name])
                    steps = _Steps(step, comparison.blocks, f"tasks: {name}, {condition}, {label}", suite)
                    if name in chosen:
                        lm.answered = steps.answered
                        results = harness.run(lm, suite, comparison, bootstraps=0)
                        for row in rows_of(suite):
                            value = value_of(results, row, main_metric(results, row))
                            found.setdefault(condition, {}).setdefault(row, {})[label] = value
                    steps.finish()
            del lm
    return found


def _lm_eval():
    """The two modules that import it."""
    try:
        from hfcompress.evaluation import harness, task_library
    except ImportError as error:
        raise MissingExtraError("The measurement 'tasks' needs lm-eval: pip install 'hfcompress[tasks]'.") from error
    return harness, task_library


def _names(comparison: Comparison) -> tuple[str, ...]:
    if not comparison.tasks:
        raise InvalidValueError("No task is named; give tasks, such as 'continuation', which needs no network.")
    if comparison.limit is not None and comparison.limit < 1:
        raise InvalidValueError(f"limit is {comparison.limit}; give the documents per task, at least 1, or nothing.")
    return comparison.tasks


class _Steps:
    """The steps of one suite on one model: exactly `total`, however its requests are batched."""

    def __init__(self, step: Callable[[str], object], total: int, description: str, suite: Mapping[str, Any]):
        self.step, self.left, self.total = step, total, total
        self.description, self.tasks, self.sequences = description, suite["tasks"].values(), 0

    def answered(self, sequences: int) -> None:
        """So many more are done; a long text may be several, and several one-token answers may be one."""
        self.sequences += sequences
        requests = sum(len(task.instances) for task in self.tasks)
        self._until(max(0, self.total - self.total * self.sequences // requests))

    def finish(self) -> None:
        """All are."""
        self._until(0)

    def _until(self, left: int) -> None:
        while self.left > left:
            self.left -= 1
            self.step(self.description)
