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
Long generation: whether the two models drift apart along a text, and whether compression makes a model repeat itself.

The original samples long continuations of a few prompts, and both models read them: the divergence along the text is
the drift. Each model also writes its own, with the same random numbers, and the share of repeated 4-grams is compared;
and both continue the prompts greedily, to see how long they agree.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.calibration.tokens import Tokens
from hfcompress.evaluation.comparison import Comparison, whole_model
from hfcompress.evaluation.quality import clustered, diverge
from hfcompress.evaluation.rows import by_position, context_length, starts
from hfcompress.models.checkpoint import Checkpoint


PROMPTS = 4
SEEDS = 3
LENGTH = 4096  # tokens, prompt included, or the model's context
PROMPT_SHARE = 8  # one token in eight is the prompt's
GREEDY_TOKENS = 256
NGRAM = 4
BUCKETS = 8
SHOWN = 64  # tokens of a prompt in the report
STEPS = 8  # of progress per model


def units(comparison: Comparison) -> int:
    """Steps that [`measure`] will report."""
    return 2 * STEPS + 2 * comparison.blocks


def measure(comparison: Comparison) -> dict[str, Any]:
    """
    Returns:
        `dict`: `kl_by_position` along what the original sampled (half-open buckets of positions in the row, the prompt
        left out), `repetition` of each model's own samples with standard errors and their paired `difference`, the same
        of what they continue greedily (`greedy_repetition`), `common_prefix`, the mean number of greedy tokens before
        the two models differ, `generations` (greedy), and `how`.
    """
    length = min(context_length(comparison.baseline), LENGTH)
    prompts = starts(comparison.tokens, max(1, length // PROMPT_SHARE), comparison.seed)[:PROMPTS]
    start = prompts.shape[1]
    many = np.tile(prompts, (SEEDS, 1))
    draws = np.random.default_rng(comparison.seed).random((len(many), length - start))
    greedy, sampled = {}, {}
    for name, checkpoint in comparison.models:
        greedy[name], sampled[name] = _written(comparison, name, checkpoint, prompts, many, draws)
    read = Tokens(np.concatenate([many, sampled["baseline"]], axis=1), "sampled by the original")
    found = diverge(comparison, read, "reading what the original wrote")
    edges = np.unique(np.linspace(start, length, BUCKETS + 1).round().astype(int))
    agreed = np.array([_agreement(*pair) for pair in zip(greedy["baseline"], greedy["compressed"], strict=True)])
    common, common_error = clustered(agreed, np.arange(len(agreed)))
    return {
        "kl_by_position": by_position(found, edges.tolist()),
        "repetition": _repetition(sampled["baseline"], sampled["compressed"]),
        "greedy_repetition": _repetition(greedy["baseline"], greedy["compressed"]),
        "common_prefix": common,
        "common_prefix_stderr": common_error,
        "generations": _generations(comparison, prompts, greedy),
        "how": {
            "seed": comparison.seed,
            "data": comparison.tokens.source,
            "prompts": f"{len(prompts)} rows' first {start} tokens",
            "samples": f"{SEEDS} per prompt from independent random numbers, {length - start} tokens each, temperature 1, "
            "the end token ignored; the same number picks each token for both models",
            "greedy": f"{greedy['baseline'].shape[1]} tokens per prompt",
            "kl_by_position": "both models read what the original sampled; positions from `from` up to `to`, exclusive",
            "repetition": f"1 - distinct / all {NGRAM}-grams of a continuation (seq-rep-{NGRAM}); standard error over the "
            f"{len(many)} samples, and over the {len(prompts)} greedy continuations",
            "standard_errors": "clustered by row",
            "teacher": found.teacher,
            "dtype": str(comparison.dtype).removeprefix("torch."),
            "device": str(comparison.device),
        },
    }


def _written(
    comparison: Comparison, name: str, checkpoint: Checkpoint, prompts: np.ndarray, many: np.ndarray, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One model's greedy continuations and its samples; the model is in memory no longer than this takes."""
    tokens = draws.shape[1]
    tell = _every(comparison, tokens, f"generating: {name}")
    with whole_model(checkpoint, comparison.device, comparison.dtype) as model:
        return generate(model, prompts, min(GREEDY_TOKENS, tokens)), generate(model, many, tokens, draws, tell)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: np.ndarray,
    tokens: int,
    draws: np.ndarray | None = None,
    tell: Callable[[int], None] | None = None,
) -> np.ndarray:
    """
    Continuations of exactly `tokens` tokens, whatever the model says about an end.

    Args:
        model (`PreTrainedModel`): the model.
        prompts (`np.ndarray`): int64 `(rows, prompt_len)`.
        tokens (`int`): how many to add.
        draws (`np.ndarray`, *optional*): float64 `(rows, tokens)` in [0, 1): each picks one token through the inverse
            of the distribution's cumulative sum, so a row is the same in any batch and two models that say the same
            write the same. Greedy if not given.
        tell (`Callable`, *optional*): called with the index of every token that is there.

    Returns:
        `np.ndarray`: int64 `(rows, tokens)`.
    """
    step, cache, written = torch.from_numpy(prompts).to(model.device), None, []
    for index in range(tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1]
        if draws is None:
            step = logits.argmax(-1, keepdim=True)
        else:
            step = _picked(logits, torch.from_numpy(draws[:, index : index + 1])).to(model.device)
        written.append(step.cpu())
        if tell is not None:
            tell(index)
    return torch.cat(written, dim=1).numpy()


def _picked(logits: Tensor, draws: Tensor) -> Tensor:
    """The tokens `(rows, 1)` in whose share of the cumulative probability the draws fall, on the CPU in float64."""
    cumulative = logits.cpu().double().softmax(-1).cumsum(-1)
    places = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return places.clamp(max=logits.shape[-1] - 1)


def _every(comparison: Comparison, tokens: int, label: str) -> Callable[[int], None]:
    """Tells of `STEPS` steps while so many tokens are written."""

    def tell(index: int) -> None:
        done = (index + 1) * STEPS // tokens - index * STEPS // tokens
        if done:
            comparison.progress.step(label, done)

    return tell


def repeated(ids: np.ndarray, n: int = NGRAM) -> float:
    """
    The share of n-grams that occurred before: 1 - distinct / all (Welleck et al. 2020, seq-rep-n); 0 for fewer than n
    tokens.

    Args:
        ids (`np.ndarray`): int64 `(tokens,)`.
        n (`int`, *optional*): the length of the n-grams.
    """
    if len(ids) < n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, n)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def _repetition(baseline: np.ndarray, compressed: np.ndarray) -> dict[str, float | None]:
    theirs, ours = (np.array([repeated(row) for row in rows]) for rows in (baseline, compressed))
    results = {}
    for name, values in (("baseline", theirs), ("compressed", ours), ("difference", ours - theirs)):
        results[name], results[f"{name}_stderr"] = clustered(values, np.arange(len(values)))
    return results


def _agreement(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two continuations begin with alike."""
    different = np.flatnonzero(one != other)
    return int(different[0]) if len(different) else len(one)


def _generations(comparison: Comparison, prompts: np.ndarray, greedy: dict[str, np.ndarray]) -> list[dict[str, str]]:
    """Prompts and greedy continuations as text, or as token ids where there is no tokenizer."""
    tokenizer = comparison.baseline.tokenizer

    def text(ids: np.ndarray) -> str:
        return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids.tolist())

    return [
        {"prompt": text(prompt[-SHOWN:]), **{name: text(greedy[name][index]) for name in greedy}}
        for index, prompt in enumerate(prompts)
    ]
