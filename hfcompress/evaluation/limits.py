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
What got worse, in sentences: the part of a report that a reader should not have to look for.

How it works: one function for each section of the report. Any part of a report may be missing or null, and says nothing
then. A change within two standard errors is not called one; where no standard error is known, any change is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hfcompress.evaluation.numbers import counted, is_number, number, percent, plus_minus, span
from hfcompress.models.manifest import format_of


WIDE = 2.0  # a divergence so many times the usual one is worth a sentence
SIGNIFICANT = 2.0  # standard errors
LOADED = "Loaded by plain transformers it"
SIDES = ("baseline", "compressed")
ENCODER = "AutoModelForMaskedLM"  # by which encoders are loaded that have a head
STATES = "AutoModel", "AutoModelForTextEncoding"  # and those that have none
SEES = "AutoModelForImageTextToText"


def limits(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """
    Args:
        manifest (`Mapping`): what `hfcompress.json` holds.
        report (`Mapping`): what `eval_results.json` holds; may be empty.

    Returns:
        `list[str]`: sentences, the general ones first.
    """
    sections = (_quality, _tasks, _robustness, _stability, _explain, _speed, _memory, _energy)
    return [
        *_coverage(manifest),
        *_sparsity(manifest),
        *(sentence for section in sections for sentence in section(report)),
    ]


def _coverage(manifest: Mapping[str, Any]) -> Iterator[str]:
    if manifest.get("loaded_by") == SEES:
        yield "Only the part that reads text was compressed, and measured, on text; what takes in images is as it was."
    fallbacks = [_at(row, "name") for row in manifest.get("linears") or () if _at(row, "fallback")]
    if fallbacks:
        were = "was" if len(fallbacks) == 1 else "were"
        yield f"{counted(len(fallbacks), 'linear')} {were} solved by a fallback, the first of them {fallbacks[0]}."
    experts = manifest.get("experts") or {}
    if few := experts.get("few"):
        yield (
            f"Of {experts['count']} experts {few} were sent fewer calibration tokens than their linears have inputs, the fewest "
            f"{experts['fewest']}; they were also solved on tokens that were sent to others."
        )
    for names, reason in by_reason(manifest.get("skipped") or {}):
        were = "was" if len(names) == 1 else "were"
        yield f"{several(names)} {were} left alone: {reason or 'the reason is not known'}."


def by_reason(skipped: Mapping[str, str | None]) -> list[tuple[list[str], str | None]]:
    """The linears that were left alone, those with the same reason together."""
    reasons = dict.fromkeys(skipped.values())
    return [([name for name, own in skipped.items() if own == reason], reason) for reason in reasons]


def several(names: Sequence[str]) -> str:
    """`lm_head`, or `24 linears, the first of them model.layers.0.mlp.gate,`."""
    return names[0] if len(names) == 1 else f"{counted(len(names), 'linear')}, the first of them {names[0]},"


def _sparsity(manifest: Mapping[str, Any]) -> Iterator[str]:
    rows = [row for row in manifest.get("linears") or () if _at(row, "pattern")]
    if rows and format_of(manifest) == "sparse24":
        yield "The zeros take no room in the file, and as much memory as other values once it is loaded."
    elif rows and all(_at(row, "type") == "plain" for row in rows):
        yield (
            "The zeros are stored like any other value: neither the file nor the memory is smaller, and without kernels "
            "for such a pattern nothing is faster."
        )
    elif rows:
        yield "The zeros are stored like any other code: they make nothing smaller or faster by themselves."


def _quality(report: Mapping[str, Any]) -> Iterator[str]:
    if (change := _value(report, "likeness_change")) is not None:
        spread = _value(report, "likeness_spread")
        yield (
            f"The cosine of two rows' embeddings changed by {number(change, 3)}"
            f"{'' if spread is None else f', where those of the original differ by {number(spread, 3)}'}."
        )
        return
    if _at(report, "perplexity") is None:
        yield "Its quality was not measured."
        return
    if (masked := _value(report, "how", "masked")) is not None:
        yield f"All figures are of {percent(masked, 2)} of the tokens, which were masked and predicted from the others."
    if _at(report, "how", "own_output"):
        yield "All figures are of what the original itself says to what its encoder is given, drawn from its own distribution."
    ours, theirs = (_value(report, key) for key in ("perplexity", "baseline_perplexity"))
    if ours and theirs and _exceeds(math.log(ours / theirs), _value(report, "log_perplexity_difference_stderr")):
        yield f"Perplexity rose by {percent(ours / theirs - 1, 3)}, from {number(theirs, 5)} to {number(ours, 5)}."
    agreement = _value(report, "top1_agreement")
    if agreement is not None and agreement < 1:
        yield f"The most likely {'token' if masked else 'next token'} is another one at {percent(1 - agreement, 3)} of the positions."
    if (shared := _value(report, "how", "overlap_with_calibration") or 0) > 0:
        yield f"{percent(shared, 3)} of the evaluation's text was also calibrated on, so the figures flatter it."
    here, elsewhere = _value(report, "kl_mean"), _value(report, "out_of_domain", "kl_mean")
    if here and elsewhere and elsewhere > WIDE * here:
        data = _at(report, "out_of_domain", "data") or "text of another domain"
        yield f"On {data} it is {number(elsewhere / here, 2)} times as far from the original."


def _tasks(report: Mapping[str, Any]) -> Iterator[str]:
    for task, score in (_at(report, "tasks", "scores") or {}).items():
        theirs, ours = _pair(score)
        if theirs is None or ours is None:
            continue
        loss = theirs - ours if _at(score, "higher_is_better") is not False else ours - theirs
        errors = _pair(score, suffix="_stderr")
        if loss > 0:
            within = "" if _exceeds(loss, *errors) else ", within two standard errors"
            yield f"{task}: {_at(score, 'metric') or 'score'} went from {number(theirs)} to {number(ours)}{within}."


def _robustness(report: Mapping[str, Any]) -> Iterator[str]:
    conditions = _at(report, "robustness", "conditions") or {}
    if clean := _value(conditions, "clean", "kl_mean"):
        for name in conditions:
            found = _value(conditions, name, "kl_mean")
            if found and found > WIDE * clean:
                times = number(found / clean, 2)
                yield f"Under {name.replace('_', ' ')} the divergence is {times} times that on clean text."
    error = _at(report, "robustness", "calibration_error")
    (theirs, ours), errors = _pair(error), _pair(error, suffix="_stderr")
    if theirs is not None and ours is not None and _exceeds(ours - theirs, *errors):
        yield f"Its confidence is further from the truth: the calibration error rose {_from_to(theirs, ours, errors)}."


def _stability(report: Mapping[str, Any]) -> Iterator[str]:
    rate = _at(report, "stability", "repetition")
    (theirs, ours), errors = _pair(rate), _pair(rate, suffix="_stderr")
    paired = _value(rate, "difference_stderr")  # both models wrote after the same prompts
    if theirs is not None and ours is not None and _exceeds(ours - theirs, *(errors if paired is None else [paired])):
        yield f"It repeats itself more: the share of repeated word sequences rose {_from_to(theirs, ours, errors)}."
    buckets = [b for b in _at(report, "stability", "kl_by_position") or () if _value(b, "kl_mean") is not None]
    if buckets and buckets[-1]["kl_mean"] > WIDE * buckets[0]["kl_mean"]:
        ends = (
            f"{number(b['kl_mean'], 3)} nats over positions {span(b.get('from'), b.get('to'))}"
            for b in (buckets[0], buckets[-1])
        )
        yield f"It drifts away from the original along a text: the KL is {' and '.join(ends)}."


def _explain(report: Mapping[str, Any]) -> Iterator[str]:
    blocks = [b for b in _at(report, "explain", "blocks") or () if _value(b, "kl_swapped_in")]
    if blocks:
        worst = max(blocks, key=lambda block: block["kl_swapped_in"])
        name = worst.get("name") or f"block {worst.get('block')}"
        kl = plus_minus(worst["kl_swapped_in"], worst.get("kl_swapped_in_stderr"))
        yield f"Of all blocks {name} hurts most: compressed alone, it costs a KL of {kl} nats."


def _speed(report: Mapping[str, Any]) -> Iterator[str]:
    for key, does in (("decode", "decodes"), ("prefill", "reads a prompt")):
        theirs, ours = _pair(_at(report, "speed"), "batches", "1", f"{key}_tokens_per_second")
        errors = _pair(_at(report, "speed"), "batches", "1", f"{key}_stderr")
        if theirs and ours and _exceeds(theirs - ours, *errors):
            yield (
                f"{LOADED} {does} at {number(ours / theirs, 3)} times the original's speed on the machine that "
                "measured it."
            )


def _memory(report: Mapping[str, Any]) -> Iterator[str]:
    theirs, ours = _pair(_at(report, "memory"), "peak_bytes")
    if theirs and ours and ours >= theirs:
        yield f"{LOADED} takes no less memory than the original while generating."


def _energy(report: Mapping[str, Any]) -> Iterator[str]:
    theirs, ours = _pair(_at(report, "energy"), "joules_per_token")
    errors = _pair(_at(report, "energy"), "joules_per_token_stderr")
    if theirs and ours and _exceeds(ours - theirs, *errors):
        estimated = ", by an estimate" if _at(report, "energy", "how", "source") == "estimate" else ""
        yield f"{LOADED} takes {number(ours / theirs, 3)} times the original's energy a token{estimated}."


def _exceeds(change: float, *errors: float | None) -> bool:
    """Whether a change for the worse is one, and not within two standard errors of none."""
    return change > SIGNIFICANT * math.hypot(*(error or 0.0 for error in errors))


def _from_to(theirs: float, ours: float, errors: list[float | None]) -> str:
    before, after = (percent(value, 3, error) for value, error in zip((theirs, ours), errors, strict=True))
    return f"from {before} to {after}"


def _pair(found: Any, *keys: str, suffix: str = "") -> list[float | None]:
    """A number of the original and of the compressed model."""
    return [_value(found, side + suffix, *keys) for side in SIDES]


def _value(found: Any, *keys: str) -> float | None:
    """A number that lies there, or `None`."""
    value = _at(found, *keys)
    return value if is_number(value) else None


def _at(found: Any, *keys: str) -> Any:
    """What lies there, or `None` where a part of the way is missing."""
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
