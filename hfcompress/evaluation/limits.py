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
"""What got worse, in sentences: the part of a report that a reader should not have to look for."""

from collections.abc import Iterator, Mapping
from typing import Any

from hfcompress.evaluation.page import number, percent


WIDE = 2.0  # a divergence so many times the usual one is worth a sentence
SIGNIFICANT = 2.0  # standard errors


def limits(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """
    Args:
        manifest (`Mapping`): what `hfcompress.json` holds.
        report (`Mapping`): what `eval_results.json` holds; may be empty.

    Returns:
        `list[str]`: sentences, the general ones first.
    """
    return [*_coverage(manifest), *_quality(report), *_tasks(report), *_robustness(report), *_cost(report)]


def _coverage(manifest: Mapping[str, Any]) -> Iterator[str]:
    fallbacks = [row["name"] for row in manifest.get("linears", ()) if row.get("fallback")]
    if fallbacks:
        yield f"{len(fallbacks)} linears were solved by a fallback, the first of them {fallbacks[0]}."
    for name, reason in manifest.get("skipped", {}).items():
        yield f"{name} was left alone: {reason}."


def _quality(report: Mapping[str, Any]) -> Iterator[str]:
    if "perplexity" not in report:
        yield "Its quality was not measured."
        return
    change = report["perplexity"] / report["baseline_perplexity"] - 1
    if change > 0:
        yield (
            f"Perplexity rose by {percent(change, 3)}, from {number(report['baseline_perplexity'], 5)} to "
            f"{number(report['perplexity'], 5)}."
        )
    yield f"The most likely next token is another one at {percent(1 - report['top1_agreement'], 3)} of the positions."
    if (shared := report.get("how", {}).get("overlap_with_calibration", 0)) > 0:
        yield f"{percent(shared, 3)} of the evaluation's text was also calibrated on, so the figures flatter it."
    elsewhere = report.get("out_of_domain", {})
    if elsewhere.get("kl_mean", 0) > WIDE * report["kl_mean"]:
        times = elsewhere["kl_mean"] / report["kl_mean"]
        yield f"On {elsewhere['data']} it is {number(times, 2)} times as far from the original."


def _tasks(report: Mapping[str, Any]) -> Iterator[str]:
    for task, score in report.get("tasks", {}).get("scores", {}).items():
        loss = score["baseline"] - score["compressed"]
        loss = loss if score["higher_is_better"] else -loss
        if loss <= 0:
            continue
        errors = [score.get("baseline_stderr"), score.get("compressed_stderr")]
        word = ""
        if all(isinstance(error, (int, float)) for error in errors):
            spread = sum(error**2 for error in errors) ** 0.5
            word = "" if loss > SIGNIFICANT * spread else ", within the standard error of the two"
        yield (
            f"{task}: {score['metric']} went from {number(score['baseline'])} to {number(score['compressed'])}{word}."
        )


def _robustness(report: Mapping[str, Any]) -> Iterator[str]:
    conditions = report.get("robustness", {}).get("conditions", {})
    clean = conditions.get("clean", {}).get("kl_mean")
    if not clean:
        return
    for name, found in conditions.items():
        if found["kl_mean"] > WIDE * clean:
            times = number(found["kl_mean"] / clean, 2)
            yield f"Under {name.replace('_', ' ')} the divergence is {times} times that on clean text."


def _cost(report: Mapping[str, Any]) -> Iterator[str]:
    speed = report.get("speed", {})
    if speed:
        ours, theirs = (speed[side]["batches"]["1"]["decode_tokens_per_second"] for side in ("compressed", "baseline"))
        if ours <= theirs:
            yield (
                f"Loaded by plain transformers it decodes at {number(ours / theirs, 3)} times the original's speed "
                "on the machine that measured it."
            )
    memory = report.get("memory", {})
    if memory and memory["compressed"]["peak_bytes"] >= memory["baseline"]["peak_bytes"]:
        yield "Loaded by plain transformers it takes no less memory than the original while generating."
