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
Whether the two models drift apart on text that is not as it should be: both side by side, on the same rows.

Rows of the evaluation's text are taken as they are, with typos, wrong capitals or careless spacing, and with tokens
swapped; beside them rows of source code and of other languages. Along long rows the divergence is followed by
position; on the clean rows both models' confidence is compared with how often they are right; small models are
attacked; and where tasks are asked for, these are answered under the same noise.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import transformers

from hfcompress.calibration.languages import texts
from hfcompress.calibration.other_text import PACKAGE, source_code
from hfcompress.calibration.tokens import Tokens, pack_texts
from hfcompress.errors import CalibrationError, HfcompressError, UnsupportedModelError
from hfcompress.evaluation import adversarial, tasks
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.noise import (
    BLANK_RATE,
    CASE_RATE,
    SWAP_RATE,
    TYPO_RATE,
    perturbations,
    retokenized,
    with_swaps,
)
from hfcompress.evaluation.quality import Divergence, diverge
from hfcompress.evaluation.rows import by_position, context_length, starts, unpadded


ROWS = 32
LANGUAGE_LENGTH = 256  # the texts are short
LONG_LENGTH, LONG_ROWS = 4096, 4
CONFIDENCE_BINS = 15
CONDITIONS = {
    "clean": "rows of the evaluation's text",
    "typos": f"the clean rows with {TYPO_RATE:.0%} of the letters swapped, dropped, doubled or hit beside",
    "case": f"the clean rows with wrong capitals in {CASE_RATE:.0%} of the words",
    "whitespace": f"the clean rows with {BLANK_RATE:.0%} of the blanks doubled, dropped or made newlines",
    "token_swaps": f"the clean rows with {SWAP_RATE:.0%} of the tokens replaced by random ones, which are also predicted",
    "code": f"Python source of {PACKAGE} {transformers.__version__}",
    "language": f"own texts in {', '.join(texts())}",
}
TASK_CONDITIONS = ("clean", "typos", "case", "whitespace", tasks.SHUFFLED)
KEPT = (
    "kl_mean",
    "kl_mean_stderr",
    "perplexity",
    "baseline_perplexity",
    "log_perplexity_difference",
    "log_perplexity_difference_stderr",
    "top1_agreement",
    "top1_agreement_stderr",
    "tokens",
)


HOW = {
    "positions": f"the evaluation's rows joined to at most {LONG_ROWS} rows as long as the model's context, at most "
    f"{LONG_LENGTH} tokens, or the clean rows where these are as long; buckets from `from` up to `to`, exclusive",
    "calibration_error": f"top-1 confidence of the next token on the clean rows, {CONFIDENCE_BINS} equally wide bins; "
    "standard error by the jackknife over rows",
    "adversarial": f"HotFlip: up to {adversarial.SWAPS} swaps in the first half of rows of at most {adversarial.LENGTH} "
    "tokens, found on the original in float32; the second half is scored",
    "tasks": "the main metric with every context changed as the text above is, and with the few-shot examples in "
    f"another order ({tasks.SHUFFLED})",
}


def units(comparison: Comparison) -> int:
    """Steps that [`measure`] will report."""
    runs = len(CONDITIONS) + 1  # and the long rows
    return 2 * comparison.blocks * runs + adversarial.units(comparison) + _task_units(comparison)


def _task_units(comparison: Comparison) -> int:
    return tasks.units(comparison) * len(TASK_CONDITIONS)


def measure(comparison: Comparison) -> dict[str, Any]:
    """
    Returns:
        `dict`: `conditions` (KL, perplexities, agreement, each with its standard error clustered by row), `positions`
        (KL by position in long rows, half-open buckets), `calibration_error` and the `reliability` bins that it is
        made of, `adversarial`, `tasks` if the comparison has any, and `how`, in which `absent` says why something is
        missing.
    """
    clean = subset(comparison.tokens, ROWS, comparison.seed)
    found, described, absent = _conditions(comparison, clean)
    statistics = {name: divergence.results() for name, divergence in found.items()}
    results: dict[str, Any] = {
        "conditions": {name: {key: value[key] for key in KEPT} for name, value in statistics.items()},
        "positions": _positions(comparison, clean, found["clean"]),
        **_calibration(found["clean"]),
    }
    attempts = {"adversarial": _adversarial} | ({"tasks": _tasks} if comparison.tasks else {})
    for name, attempt in attempts.items():
        try:
            results[name] = attempt(comparison)
        except HfcompressError as error:
            absent[name] = str(error)
    results["how"] = {
        "seed": comparison.seed,
        "data": clean.source,
        "data_sha256": clean.sha256,
        "conditions": described,
        **{key: text for key, text in HOW.items() if key in results},
        "standard_errors": "clustered by row",
        "teacher": found["clean"].teacher,
        "dtype": str(comparison.dtype).removeprefix("torch."),
        "device": str(comparison.device),
        **({"absent": absent} if absent else {}),
    }
    return results


def _conditions(comparison: Comparison, clean: Tokens) -> tuple[dict[str, Divergence], dict[str, str], dict[str, str]]:
    """What was found under each condition, what its rows are, and why a condition is absent."""
    found, described, absent = {}, {}, {}
    vocabulary = comparison.baseline.config.get_text_config().vocab_size
    for name, build in _builders(comparison, clean, vocabulary).items():
        label = f"robustness: {name}"
        try:
            tokens = build()
            if (highest := tokens.input_ids.max()) >= vocabulary:
                raise CalibrationError(
                    f"The tokenizer gives the id {highest}, but the model's vocabulary has {vocabulary}."
                )
        except CalibrationError as error:
            absent[name] = str(error)
            comparison.progress.step(label, 2 * comparison.blocks)
            continue
        found[name] = diverge(comparison, tokens, label)
        described[name] = f"{CONDITIONS[name]}; {len(tokens.input_ids)} rows of {tokens.input_ids.shape[1]} tokens"
    return found, described, absent


def _builders(comparison: Comparison, clean: Tokens, vocabulary: int) -> dict[str, Callable[[], Tokens]]:
    """How each condition's rows are made; those of text raise CalibrationError where they cannot be."""
    checkpoint, seed = comparison.baseline, comparison.seed
    count, seq_len = clean.input_ids.shape
    builders: dict[str, Callable[[], Tokens]] = {
        "clean": lambda: clean,
        **{name: partial(retokenized, clean, checkpoint, noise) for name, noise in perturbations(seed).items()},
        "token_swaps": lambda: with_swaps(clean, vocabulary, seed),
        "code": lambda: pack_texts(source_code(), PACKAGE, checkpoint, count, seq_len, seed),
        "language": lambda: pack_texts(
            texts().values(), "text in other languages", checkpoint, count, min(seq_len, LANGUAGE_LENGTH), seed
        ),
    }
    return builders


def subset(tokens: Tokens, rows: int, seed: int) -> Tokens:
    """At most `rows` of the rows, seeded, in their order."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(tokens.input_ids))[:rows])
    mask = None if tokens.mask is None else tokens.mask[chosen]
    return Tokens(tokens.input_ids[chosen], tokens.source, mask, tokens.note)


def calibration_error(
    confidence: np.ndarray, correct: np.ndarray, rows: np.ndarray
) -> tuple[float, float | None, list[dict[str, Any]]]:
    """
    The expected calibration error (Guo et al. 2017, section 2) of next-token predictions, its standard error by the
    jackknife over rows (`None` for a single row), and the bins, equally wide, that it sums over.

    Args:
        confidence (`np.ndarray`): `(n,)`, probability of the most probable token.
        correct (`np.ndarray`): bool `(n,)`, whether that is the token that follows.
        rows (`np.ndarray`): int `(n,)`, the row of each.
    """
    confidence, correct = confidence.astype(np.float64), correct.astype(np.float64)
    bins = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    _, row = np.unique(rows, return_inverse=True)
    count = row.max() + 1
    gaps = np.zeros((count, CONFIDENCE_BINS))
    np.add.at(gaps, (row, bins), confidence - correct)
    error = np.abs(gaps.sum(0)).sum() / len(bins)
    stderr = None
    if count > 1:
        without = np.abs(gaps.sum(0) - gaps).sum(1) / (len(bins) - np.bincount(row))
        stderr = float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))
    reliability = [
        {
            "from": index / CONFIDENCE_BINS,
            "to": (index + 1) / CONFIDENCE_BINS,
            "confidence": float(confidence[bins == index].mean()),
            "accuracy": float(correct[bins == index].mean()),
            "tokens": int((bins == index).sum()),
        }
        for index in np.unique(bins)
    ]
    return float(error), stderr, reliability


def _calibration(found: Divergence) -> dict[str, Any]:
    errors, reliability = {}, {}
    sides = {
        "baseline": (found.baseline_confidence, found.baseline_correct),
        "compressed": (found.confidence, found.correct),
    }
    for side, (confidence, correct) in sides.items():
        errors[side], errors[f"{side}_stderr"], reliability[side] = calibration_error(confidence, correct, found.row)
    return {"calibration_error": errors, "reliability": reliability}


def _positions(comparison: Comparison, clean: Tokens, found: Divergence) -> list[dict[str, Any]]:
    """KL by position, in buckets that double, in rows as long as context and text allow."""
    ids = np.concatenate(unpadded(comparison.tokens))
    length = min(context_length(comparison.baseline), LONG_LENGTH, len(ids))
    if length > clean.input_ids.shape[1]:
        rows = min(LONG_ROWS, len(ids) // length)
        long = Tokens(ids[: rows * length].reshape(rows, length), comparison.tokens.source)
        found = diverge(comparison, long, "robustness: long rows")
    else:  # the clean rows are as long as rows can be
        comparison.progress.step("robustness: long rows", 2 * comparison.blocks)
    last = int(found.position.max())
    return by_position(found, [*(1 << i for i in range(last.bit_length())), last + 1])


def _adversarial(comparison: Comparison) -> dict[str, Any]:
    try:
        return adversarial.measure(comparison, starts(comparison.tokens, adversarial.LENGTH, comparison.seed))
    except (CalibrationError, UnsupportedModelError):
        comparison.progress.step("adversarial swaps", adversarial.units(comparison))
        raise


def _tasks(comparison: Comparison) -> dict[str, Any]:
    noises = {"clean": lambda text: text, **perturbations(comparison.seed)}
    left = _task_units(comparison)

    def step(description: str) -> None:
        nonlocal left
        left -= 1
        comparison.progress.step(description)

    try:
        return tasks.scores_under(comparison, noises, shuffled=True, step=step)
    except HfcompressError:
        comparison.progress.step("tasks under noise", left)
        raise
