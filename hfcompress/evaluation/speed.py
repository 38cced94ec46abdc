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
"""Prefill and decoding speed, latency per token, parameters and FLOPs."""

from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.fresh_process import circumstances, context, in_turns, mean_and_error, prompts, ways
from hfcompress.evaluation.probe import architecture
from hfcompress.models.checkpoint import Checkpoint


BATCHES = (1, 8)
ROUNDS = 2
REPEATS = 2  # at least, in every round
PROMPT_LENGTH = 512
NEW_TOKENS = 33  # the first comes with the prefill


def units(comparison: Comparison) -> int:
    """Steps of progress: one for every process."""
    return ROUNDS * len(ways(comparison))


def measure(comparison: Comparison) -> dict[str, Any]:
    """
    Time both models, in turns, and the compressed one on packed weights where there are kernels for them.

    Args:
        comparison (`Comparison`): the two models; `comparison.seconds` is the time over which each is repeated, shared
            among the rounds and the batch sizes.

    Returns:
        `dict`: under `baseline`, `compressed` and perhaps `packed` `parameters`, `flops_per_token` and, for each of `batches`, tokens
        per second with standard errors, and the milliseconds of one decoding step; under `how` how it was done.

    Raises:
        HfcompressError: a model could not be run.
    """
    length = min(PROMPT_LENGTH, context(comparison) // 2)
    new_tokens = min(NEW_TOKENS, context(comparison) - length)
    turns = ways(comparison)
    readings = in_turns(
        comparison,
        ROUNDS,
        turns=turns,
        measurement="speed",
        prompts=prompts(comparison.tokens, max(BATCHES), length),
        new_tokens=new_tokens,
        batches=list(BATCHES),
        seconds=comparison.seconds / ROUNDS,
        repeats=REPEATS,
    )
    report: dict[str, Any] = {}
    repeats = {}
    for way in turns:
        key = way.key
        parameters, flops = count(way.checkpoint, length)
        runs = {str(batch): [r for turn in readings[key] for r in turn["batches"][str(batch)]] for batch in BATCHES}
        batches = {batch: figures(taken, int(batch), length) for batch, taken in runs.items()}
        report[key] = {"parameters": parameters, "flops_per_token": flops, "batches": batches}
        repeats[key] = {batch: len(taken) for batch, taken in runs.items()}
        zeros = [turn["zeros"] for turn in readings[key] if turn.get("zeros")]
        if zeros:
            report[key]["zeros"] = with_zeros(zeros, length)
    report["how"] = {
        "repeats": repeats,
        "warm_up": "one prefill and decoding for every batch size and process, not counted",
        "errors": "standard errors of the mean over the repeats of all rounds, taken as independent",
        "prompt_length": length,
        "new_tokens": new_tokens,
        "decoding": "greedy, with the key-value cache, past end tokens; the first new token counts as prefill",
        "latency": "one decoding step of the whole batch",
        "parameters": "weights of the architecture in the configuration, tied ones once, zeros and packed ones included",
        "flops": "matrix products of a dense forward over one prompt, counted by torch's FlopCounterMode, per token of "
        "the prompt: the head at every position, the attention over the whole square (eager)",
        **circumstances(comparison, readings),
    }
    missing = [key for key, _ in comparison.models if report[key]["flops_per_token"] is None]
    if missing:
        report["how"]["not_measured"] = f"flops_per_token of {' and '.join(missing)}: the forward depends on the data"
    return report


def with_zeros(turns: list[dict[str, Any]], length: int) -> dict[str, Any]:
    """
    What kernels for 2:4 weights gain.

    Args:
        turns (`list[dict]`): of every process, `linears` with such weights, `used`, those that ran faster so, the
            `reason` if none was tried, and the `batches` taken so.
        length (`int`): tokens of each prompt.

    Returns:
        `dict`: the same, with the figures of [`figures`] in place of the runs.
    """
    found = {key: turns[0][key] for key in ("linears", "used", "reason")}
    taken = [turn["batches"] for turn in turns if "batches" in turn]
    if taken:
        sizes = taken[0]
        found["batches"] = {
            size: figures([run for batches in taken for run in batches[size]], int(size), length) for size in sizes
        }
    return found


def count(checkpoint: Checkpoint, length: int) -> tuple[int, float | None]:
    """
    Parameters and FLOPs per token of the dense architecture; a multiply-add is two FLOPs.

    Args:
        checkpoint (`Checkpoint`): whose configuration it is.
        length (`int`): of the prompt.

    Returns:
        `tuple`: the FLOPs are `None` where the forward cannot be run without data.
    """
    # other implementations of experts hide their products from the counter, or depend on the data
    model = architecture(checkpoint, attn_implementation="eager", experts_implementation="batched_mm")
    ids = torch.zeros((1, length), dtype=torch.int64, device="meta")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, use_cache=True)  # without a cache, transformers looks for packed sequences in the data
        flops = counter.get_total_flops() / length
    except RuntimeError:
        flops = None
    return sum(parameter.numel() for parameter in model.parameters()), flops


def figures(runs: list[dict[str, Any]], batch: int, length: int) -> dict[str, float]:
    """
    Args:
        runs (`list[dict]`): `prefill_seconds` and `step_seconds` of every repeat.
        batch (`int`): prompts that went together.
        length (`int`): tokens of each prompt.

    Returns:
        `dict`: what the report holds of one batch size.
    """
    prefill = mean_and_error([batch * length / run["prefill_seconds"] for run in runs])
    decode = mean_and_error([batch * len(run["step_seconds"]) / sum(run["step_seconds"]) for run in runs])
    latency = 1e3 * np.concatenate([run["step_seconds"] for run in runs])
    return {
        "prefill_tokens_per_second": prefill[0],
        "prefill_stderr": prefill[1],
        "decode_tokens_per_second": decode[0],
        "decode_stderr": decode[1],
        "latency_p50_ms": float(np.percentile(latency, 50)),
        "latency_p90_ms": float(np.percentile(latency, 90)),
    }
