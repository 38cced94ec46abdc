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
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from hfcompress.errors import InvalidValueError, MissingExtraError
from hfcompress.evaluation.comparison import Comparison


# which of a task's metrics stands for it: the first that it has; else one that is better high, else any
PREFERRED = (
    "acc_mutual_info",
    "acc_norm",
    "acc",
    "exact_match",
    "em",
    "f1",
    "mcc",
    "rougeL",
    "rouge1",
    "bleu",
    "chrf",
)
SHUFFLED = "shuffled_few_shot"
NO_FILTER = "none"  # lm-eval's name for answers taken as they are
Metric = tuple[str, str]  # its name, and the filter that the answers went through
Run = Mapping[str, Any]  # what lm-eval returned for one model on one suite


def units(comparison: Comparison) -> int:
    """Steps of progress: as many for a task on a model as it has blocks."""
    return 2 * comparison.blocks * len(dict.fromkeys(comparison.tasks))


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
    harness = _harness()
    suites = harness.load(_names(comparison), comparison.seed)
    runs: dict[str, dict[str, Run]] = {}
    context: dict[str, dict[str, int]] = {}
    for label, checkpoint in comparison.models:
        with harness.task_model(comparison, checkpoint) as lm:
            runs[label] = {}
            for name, suite in suites.items():
                steps = _Steps(comparison, f"tasks: {name}, {label}", suite)
                lm.answered = steps.answered
                runs[label][name] = harness.run(lm, suite, comparison)
                steps.finish()
            context[label] = {"tokens": lm.max_length, "requests_cut_to_it": lm.truncated}
    scores = {
        row: _score(row, leaves, suite, runs["baseline"][name], runs["compressed"][name])
        for name, suite in suites.items()
        for row, leaves in _rows(suite).items()
    }
    recoveries = [score["recovery"] for score in scores.values() if score["recovery"] is not None]
    return {
        "scores": scores,
        "recovery": sum(recoveries) / len(recoveries) if recoveries else None,
        "how": {
            "lm_eval": importlib.metadata.version("lm-eval"),
            "versions": _merged(runs["baseline"], "versions"),
            "num_fewshot": _merged(runs["baseline"], "n-shot"),
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
    step: Callable[[str], object] | None = None,
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
        step (`Callable[[str], object]`, *optional*): told `2 * (len(perturbations) + shuffled)` times what comes.

    Returns:
        `dict`: `{condition: {task: {"baseline": x, "compressed": y}}}`.

    Raises:
        HfcompressError: as [`measure`].
    """
    harness = _harness()
    suites = harness.load(_names(comparison), comparison.seed)
    read = {name: suite for name, suite in suites.items() if _has_contexts(suite)}
    conditions: dict[str, tuple[Callable[[str], str] | None, dict[str, Any]]] = {
        name: (functools.cache(change), read) for name, change in perturbations.items()
    }
    if shuffled:
        reordered = {name: harness.with_shuffled_examples(suite) for name, suite in suites.items()}
        conditions[SHUFFLED] = (None, {name: suite for name, suite in reordered.items() if suite is not None})
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for label, checkpoint in comparison.models:
        with harness.task_model(comparison, checkpoint) as lm:
            for condition, (change, chosen) in conditions.items():
                if step:
                    step(f"tasks: {condition}, {label}")
                lm.perturb = change
                for suite in chosen.values():
                    results = harness.run(lm, suite, comparison, bootstraps=0)
                    for row in _rows(suite):
                        value = _value(results, row, _main(results, row))
                        found.setdefault(condition, {}).setdefault(row, {})[label] = value
    return found


def _harness():
    try:
        from hfcompress.evaluation import harness
    except ImportError as error:
        raise MissingExtraError("The measurement 'tasks' needs lm-eval: pip install 'hfcompress[tasks]'.") from error
    return harness


def _names(comparison: Comparison) -> tuple[str, ...]:
    if not comparison.tasks:
        raise InvalidValueError("No task is named; give tasks, such as 'continuation', which needs no network.")
    if comparison.limit is not None and comparison.limit < 1:
        raise InvalidValueError(f"limit is {comparison.limit}; give the documents per task, at least 1, or nothing.")
    return comparison.tasks


class _Steps:
    """The steps of one suite on one model: exactly as many as it has blocks, however its requests are batched."""

    def __init__(self, comparison: Comparison, description: str, suite: Mapping[str, Any]):
        self.step, self.left, self.total = comparison.progress.step, comparison.blocks, comparison.blocks
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


# what lm-eval returned


def _rows(suite: Mapping[str, Any]) -> dict[str, list[str]]:
    """What is reported, with the tasks that it is made of: groups that have a score, then tasks in none of these."""
    groups = {name: group for name, group in suite.get("groups", {}).items() if group.has_aggregation}
    members = {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()}
    rows: dict[str, list[str]] = {}
    taken: set[str] = set()
    for name, leaves in sorted(members.items(), key=lambda item: -len(item[1])):
        if not taken.issuperset(leaves):  # otherwise a part of a larger group
            rows[name] = leaves
            taken.update(leaves)
    return rows | {leaf: [leaf] for leaf in suite["tasks"] if leaf not in taken}


def _has_contexts(suite: Mapping[str, Any]) -> bool:
    return all(task.OUTPUT_TYPE != "loglikelihood_rolling" for task in suite["tasks"].values())


def _score(row: str, leaves: list[str], suite: Mapping[str, Any], baseline: Run, compressed: Run) -> dict[str, Any]:
    main = _main(baseline, row)
    better = _direction(baseline, row, main)
    values = _pair(baseline, compressed, row, main)
    known = better and values["baseline"] and values["baseline"] > 0 and values["compressed"] is not None
    return {
        "metric": _label(main),
        "higher_is_better": better,
        **values,
        "recovery": values["compressed"] / values["baseline"] if known else None,
        "flips": _flips(leaves, suite, main, baseline, compressed),
        "documents": baseline["results"][row]["sample_len"],
        "metrics": {
            _label(other): _pair(baseline, compressed, row, other)
            for other in _metrics(baseline, row)
            if other != main
        },
    }


def _metrics(results: Run, row: str) -> Iterator[Metric]:
    """The metrics of a task, in its own order."""
    for key in results["results"][row]:
        name, separator, kept = key.partition(",")
        if separator and not name.endswith("_stderr"):
            yield name, kept


def _main(results: Run, row: str) -> Metric:
    def rank(metric: Metric) -> tuple[int, bool]:
        name = metric[0]
        place = PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)
        return place, not _direction(results, row, metric)

    return min(_metrics(results, row), key=rank)


def _direction(results: Run, row: str, metric: Metric) -> bool | None:
    """Whether higher is better; `None` where the task does not say."""
    return results["higher_is_better"].get(row, {}).get(metric[0])


def _label(metric: Metric) -> str:
    name, kept = metric
    return name if kept == NO_FILTER else f"{name},{kept}"


def _pair(baseline: Run, compressed: Run, row: str, metric: Metric) -> dict[str, float | None]:
    stderr = (f"{metric[0]}_stderr", metric[1])
    return {
        "baseline": _value(baseline, row, metric),
        "baseline_stderr": _value(baseline, row, stderr),
        "compressed": _value(compressed, row, metric),
        "compressed_stderr": _value(compressed, row, stderr),
    }


def _value(results: Run, row: str, metric: Metric) -> float | None:
    value = results["results"][row].get(",".join(metric))
    if value is None or isinstance(value, str) or not math.isfinite(value):  # lm-eval writes "N/A"
        return None
    return float(value)


def _flips(leaves: list[str], suite: Mapping[str, Any], main: Metric, baseline: Run, compressed: Run) -> float | None:
    """The share of documents that are answered otherwise; `None` where they are neither right nor wrong."""
    changed = []
    for leaf in leaves:
        generated = suite["tasks"][leaf].OUTPUT_TYPE == "generate_until"
        before, after = (_outcomes(run["samples"][leaf], main, generated) for run in (baseline, compressed))
        answered = generated or all(map(_is_right_or_wrong, [*before.values(), *after.values()]))
        if before.keys() != after.keys() or not answered:
            return None
        changed += [before[document] != after[document] for document in before]
    return sum(changed) / len(changed) if changed else None


def _is_right_or_wrong(value: Any) -> bool:
    return bool(np.isscalar(value) and value in (0, 1))


def _outcomes(samples: list[dict[str, Any]], main: Metric, generated: bool) -> dict[tuple[int, str], Any]:
    """By document, whether it is right, or the answer that was generated."""
    name, kept = main
    key = "filtered_resps" if generated else name
    return {(s["doc_id"], s["doc_hash"]): s[key] for s in samples if s["filter"] == kept and name in s}


def _merged(runs: Mapping[str, Run], key: str) -> dict[str, Any]:
    return {task: value for results in runs.values() for task, value in results[key].items()}
