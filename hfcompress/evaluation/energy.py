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
"""Joules per generated token, without what the machine draws when idle."""

from typing import Any

from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.fresh_process import circumstances, context, in_turns, mean_and_error, prompts
from hfcompress.evaluation.meters import open_meter


ROUNDS = 2
REPEATS = 3  # in every round
PROMPT_LENGTH = 32
NEW_TOKENS = 128
IDLE_SHARE = 0.25  # of the time


def units(comparison: Comparison) -> int:
    """Steps of progress: one for every process."""
    return ROUNDS * len(comparison.models)


def check(comparison: Comparison) -> None:
    """
    Raises:
        MissingExtraError: the device is a GPU, and pynvml is not installed.
    """
    open_meter(comparison.device)


def measure(comparison: Comparison) -> dict[str, Any]:
    """
    Meter both models while they generate, in turns.

    Args:
        comparison (`Comparison`): the two models; `comparison.seconds` is the least time over which each is metered.

    Returns:
        `dict`: under `baseline` and `compressed` `joules_per_token`, its standard error and the `tokens` generated;
        under `how` the `source` (`"nvml"`, `"rapl"` or `"estimate"`), a `text` that says what it counts, and how it
        was done.

    Raises:
        HfcompressError: a model could not be run.
        MissingExtraError: the device is a GPU, and pynvml is not installed.
    """
    check(comparison)  # before anything is loaded
    length = min(PROMPT_LENGTH, context(comparison) // 2)
    new_tokens = min(NEW_TOKENS, context(comparison) - length)
    idle_seconds = IDLE_SHARE * comparison.seconds / ROUNDS
    readings = in_turns(
        comparison,
        ROUNDS,
        measurement="energy",
        prompts=prompts(comparison.tokens, 1, length),
        new_tokens=new_tokens,
        seconds=comparison.seconds / ROUNDS,
        repeats=REPEATS,
        idle_seconds=idle_seconds,
    )
    report: dict[str, Any] = {key: figures(turns) for key, turns in readings.items()}
    first = readings["baseline"][0]
    idle = f"taken for {idle_seconds:g} s in every process, with the model loaded and asleep"
    report["how"] = {
        "source": first["source"],
        "text": first["text"],
        "idle": idle if first["counts_idle"] else "not counted by an estimate, so nothing is subtracted",
        "idle_watts": {key: [turn["idle_watts"] for turn in turns] for key, turns in readings.items()},
        "repeats": ROUNDS * REPEATS,
        "errors": "standard errors of the mean over the repeats of all rounds, taken as independent",
        "warm_up": "one generation in every process, not counted",
        "prompt_length": length,
        "new_tokens": new_tokens,
        "decoding": "greedy, batch 1, with the key-value cache, past end tokens; the prefill of the prompt included",
        **circumstances(comparison, readings),
    }
    return report


def figures(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Args:
        turns (`list[dict]`): one model's readings: `idle_watts`, and `joules`, `seconds` and `tokens` of its `repeats`.

    Returns:
        `dict`: joules per token over what would have been drawn in the same time anyway.
    """
    repeats = [{**repeat, "idle_watts": turn["idle_watts"]} for turn in turns for repeat in turn["repeats"]]
    per_token = [(r["joules"] - r["idle_watts"] * r["seconds"]) / r["tokens"] for r in repeats]
    joules, error = mean_and_error(per_token)
    return {
        "joules_per_token": joules,
        "joules_per_token_stderr": error,
        "tokens": sum(r["tokens"] for r in repeats),
    }
