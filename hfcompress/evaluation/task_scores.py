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
"""What lm-eval returned for two models, as the report has it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


# which of a task's metrics stands for it: the first that it has; else one that is better high, else any
PREFERRED = (
    "acc_mutual_info",
    "acc_norm",
    "acc",
    "token_f1",
    "exact_match",
    "em",
    "f1",
    "mcc",
    "rougeL",
    "rouge1",
    "bleu",
    "chrf",
)
NO_FILTER = "none"  # lm-eval's name for answers taken as they are
Metric = tuple[str, str]  # its name, and the filter that the answers went through
Run = Mapping[str, Any]  # what lm-eval returned for one model on one suite


def rows_of(suite: Mapping[str, Any]) -> dict[str, list[str]]:
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


def has_contexts(suite: Mapping[str, Any]) -> bool:
    """Whether something stands before its answers; not so where the perplexity of whole texts is taken."""
    return all(task.OUTPUT_TYPE != "loglikelihood_rolling" for task in suite["tasks"].values())


def compared(row: str, leaves: list[str], suite: Mapping[str, Any], baseline: Run, compressed: Run) -> dict[str, Any]:
    """
    What the report says of one of them.

    Args:
        row (`str`), leaves (`list[str]`): of [`rows_of`].
        suite (`Mapping`): the tasks.
        baseline, compressed (`Run`): the two models' results on it.
    """
    main = main_metric(baseline, row)
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


def main_metric(results: Run, row: str) -> Metric:
    """The metric that stands for a task, see [`PREFERRED`]."""

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
        "baseline": value_of(baseline, row, metric),
        "baseline_stderr": value_of(baseline, row, stderr),
        "compressed": value_of(compressed, row, metric),
        "compressed_stderr": value_of(compressed, row, stderr),
    }


def value_of(results: Run, row: str, metric: Metric) -> float | None:
    """A metric's value; `None` where there is none that is finite."""
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


def merged(runs: Mapping[str, Run], key: str) -> dict[str, Any]:
    """What one model's runs say under `key`, by task."""
    return {task: value for results in runs.values() for task, value in results[key].items()}
