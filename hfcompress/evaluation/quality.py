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
Perplexity of two models and the divergence between them.

Both models are streamed block by block, so neither is ever whole in memory; the batches' hidden states wait before the
head, and the logits of one small batch at a time are compared in float32. A compressed-tensors checkpoint is read
through that library's own decompressor.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfcompress.calibration.other_text import PACKAGE, source_code
from hfcompress.calibration.overlap import overlap
from hfcompress.calibration.tokens import Tokens, pack_texts
from hfcompress.errors import CalibrationError, CheckpointError
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.embedding import turned
from hfcompress.evaluation.logits import StreamedLogits, as_read, finite, open_for_logits, open_streamed
from hfcompress.evaluation.masking import SHARE, mask_id, masked
from hfcompress.evaluation.teacher import Distributions, TeacherCache
from hfcompress.models.adapter import adapted, adapter_of, has_adapter
from hfcompress.models.architecture import is_headless, predicts_masked
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.encoder_decoder import hears, reads_and_writes
from hfcompress.models.vocabulary import shared_vocabulary
from hfcompress.runtime.vector_cache import CodedStates, bytes_of_a_token, has_books, read_books


LOGIT_BYTES = 1 << 26  # of one batch's logits, or of one slice of a long row's, in float32
BATCH_TOKENS = 4096
OTHER_ROWS = 4  # one row of out-of-domain text for so many of the evaluation's
BINS_PER_DECADE = 4


def units(comparison: Comparison) -> int:
    """Steps that [`measure`] will report."""
    ways = 4 + 2 * has_adapter(comparison.candidate) + 2 * has_books(comparison.candidate)
    return ways * comparison.blocks


def check(comparison: Comparison) -> None:
    """
    Raises:
        UnsupportedModelError: an encoder without the token that masks others.
    """
    if predicts_masked(comparison.baseline.config):
        mask_id(comparison.baseline)


def measure(comparison: Comparison) -> dict[str, Any]:
    """
    Compare a model with the one that it was made from, on the evaluation's text and on text of another domain: at every token that
    another one precedes, or, of an encoder, at those that are masked. Of one without a head there is what
    [`hfcompress.evaluation.embedding.turned`] finds instead.

    Returns:
        `dict`: `perplexity`, `baseline_perplexity`, `log_perplexity_difference` (paired, nats per token), `kl_mean`,
        `kl_median`, `kl_p99`, `kl_max` (nats, KL(baseline || candidate) over every predicted position),
        `top1_agreement`, `rms_probability_change` (of the token that follows), `tokens` (predicted positions), standard
        errors clustered by row, `size_bytes`, `baseline_size_bytes`, the same on `out_of_domain` text and `with_adapter` and
        `with_cache` (no token's keys and values left as they are), if there are such in the folder, and `how`.

    Raises:
        CheckpointError: the two models have different tokenizers.
    """
    tokens = comparison.tokens
    headless = is_headless(comparison.candidate.config)
    where = comparison.device, comparison.dtype
    found = turned(comparison) if headless else diverge(comparison, tokens, "evaluating")
    rows, seq_len = tokens.input_ids.shape
    how: dict[str, Any] = {
        "data": tokens.source,
        "data_sha256": tokens.sha256,
        "rows": rows,
        "seq_len": seq_len,
        "dtype": str(comparison.dtype).removeprefix("torch."),
        "device": comparison.device.type,
        "baseline": comparison.baseline.name,
        "baseline_sha256": comparison.baseline_sha256,
        "candidate_sha256": comparison.candidate.sha256,
        "standard_errors": "clustered by row",
        **({} if isinstance(found, dict) else {"teacher": found.teacher}),
        **({"masked": SHARE} if predicts_masked(comparison.candidate.config) else {}),
        **({"own_output": tokens.own_output} if reads_and_writes(comparison.candidate.config) else {}),
    }
    calibrated = (comparison.manifest.get("calibration") or {}).get("sketch")
    if calibrated is not None:
        how["overlap_with_calibration"] = shared = overlap(tokens, calibrated)
        if shared > 0:
            comparison.progress.note(
                f"{shared:.1%} of the evaluation's text was calibrated on: the result will look better than it is"
            )
    told = found if isinstance(found, dict) else {**found.results(), "kl_histogram": histogram(found.kl)}
    results = {
        **told,
        "size_bytes": comparison.candidate.size_bytes,
        "baseline_size_bytes": comparison.baseline.size_bytes,
        "how": how,
    }
    if has_adapter(comparison.candidate):
        helped = diverge(comparison, label="evaluating with the adapter", adapter=True).results()
        size = sum(path.stat().st_size for path in adapter_of(comparison.candidate).glob("*.safetensors"))
        results["with_adapter"] = {**helped, "adapter_bytes": size, "data": tokens.source}
    if has_books(comparison.candidate):
        coded = diverge(comparison, label="evaluating with the cache", cache=True).results()
        results["with_cache"] = {**coded, **bytes_of_a_token(comparison.candidate), "data": tokens.source}
    try:
        samples = max(1, rows // OTHER_ROWS)
        if hears(comparison.baseline.config):
            raise CalibrationError("there is no sound of another domain")
        other = pack_texts(source_code(), PACKAGE, comparison.baseline, samples, seq_len, comparison.seed)
        other = as_read(other, comparison.baseline, *where, comparison.seed, comparison.progress, not comparison.lean)
    except CalibrationError as error:
        how["out_of_domain"] = str(error)
        comparison.progress.step("evaluating", 2 * comparison.blocks)
        return results
    label = "evaluating out of domain"
    elsewhere = turned(comparison, other, label) if headless else diverge(comparison, other, label).results()
    source = f"Python source code of the installed {PACKAGE}"
    results["out_of_domain"] = {**elsewhere, "data": source, "data_sha256": other.sha256, "rows": len(other.input_ids)}
    return results


@dataclass(frozen=True)
class Divergence:
    """
    Two models over the same text: one value per predicted position, padding left out.

    Args:
        kl (`np.ndarray`): KL(baseline || candidate), nats.
        nll, baseline_nll (`np.ndarray`): negative log-likelihood of the token that follows, nats.
        agree (`np.ndarray`): bool, whether the most probable tokens are the same.
        target_change (`np.ndarray`): the candidate's probability of the token that follows less the baseline's.
        confidence, baseline_confidence (`np.ndarray`): probability of the most probable token.
        correct, baseline_correct (`np.ndarray`): bool, whether that is the token that follows.
        row, position (`np.ndarray`): where the predicted token is.
        teacher (`str`): where the baseline's distributions came from.
    """

    kl: np.ndarray
    nll: np.ndarray
    baseline_nll: np.ndarray
    agree: np.ndarray
    target_change: np.ndarray
    confidence: np.ndarray
    baseline_confidence: np.ndarray
    correct: np.ndarray
    baseline_correct: np.ndarray
    row: np.ndarray
    position: np.ndarray
    teacher: str = "live"

    def results(self) -> dict[str, Any]:
        """The statistics that reports hold."""
        difference = clustered(self.nll - self.baseline_nll, self.row)
        kl, agreement = clustered(self.kl, self.row), clustered(self.agree, self.row)
        return {
            "perplexity": math.exp(min(self.nll.mean(), 700)),
            "baseline_perplexity": math.exp(min(self.baseline_nll.mean(), 700)),
            "log_perplexity_difference": difference[0],
            "log_perplexity_difference_stderr": difference[1],
            "kl_mean": kl[0],
            "kl_mean_stderr": kl[1],
            "kl_median": float(np.median(self.kl)),
            "kl_p99": float(np.quantile(self.kl, 0.99)),
            "kl_max": float(self.kl.max()),
            "top1_agreement": agreement[0],
            "top1_agreement_stderr": agreement[1],
            "rms_probability_change": float(np.sqrt((self.target_change**2).mean())),
            "tokens": len(self.kl),
        }


def clustered(values: np.ndarray, rows: np.ndarray) -> tuple[float, float | None]:
    """
    The mean of values that are correlated within their rows, and its standard error (Cameron and Miller 2015, section
    II; `None` for a single row).

    Args:
        values (`np.ndarray`): `(n,)`.
        rows (`np.ndarray`): int `(n,)`, the row of each.
    """
    values = values.astype(np.float64)
    mean = values.mean()
    _, index = np.unique(rows, return_inverse=True)
    sums = np.bincount(index, weights=values - mean)
    count = len(sums)
    if count < 2:
        return float(mean), None
    return float(mean), float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(values))


def histogram(kl: np.ndarray) -> dict[str, list]:
    """How many positions have how much divergence: bins of equal width in the logarithm, the first from zero."""
    positive = kl[kl > 0]
    low = math.floor(math.log10(max(1e-8, np.quantile(positive, 0.001)))) if len(positive) else -8
    high = max(low + 1, math.ceil(math.log10(positive.max()))) if len(positive) else 0
    edges = 10 ** np.linspace(low, high, BINS_PER_DECADE * (high - low) + 1)
    counts, _ = np.histogram(np.clip(kl, edges[0], edges[-1]), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


@torch.no_grad()
def diverge(
    comparison: Comparison,
    tokens: Tokens | None = None,
    label: str = "evaluating",
    adapter: bool = False,
    cache: bool = False,
) -> Divergence:
    """
    Both models over the same text.

    Args:
        comparison (`Comparison`): the models.
        tokens (`Tokens`, *optional*): defaults to the comparison's.
        label (`str`, *optional*): what the progress bar says.
        adapter (`bool`, *optional*, defaults to `False`): the candidate with the adapter in its folder.
        cache (`bool`, *optional*, defaults to `False`): the candidate with its keys and values as the vectors in its folder.

    Raises:
        CheckpointError: the two models have different tokenizers.
    """
    tokens = comparison.tokens if tokens is None else tokens
    candidate, baseline, progress = comparison.candidate, comparison.baseline, comparison.progress
    vocabulary = _vocabulary(candidate, baseline)
    seq_len = tokens.input_ids.shape[1]
    at_once = max(1, LOGIT_BYTES // (4 * vocabulary))  # positions
    rows = max(1, min(BATCH_TOKENS // tokens.length, at_once // seq_len))
    text, chosen = tokens.batch(), None
    if predicts_masked(candidate.config):
        asked, chosen = masked(text, mask_id(baseline), comparison.seed)
        batches = asked.split(rows)
    else:
        batches = text.split(rows)
    kept = _cache(comparison, tokens, len(batches), vocabulary)
    if adapter:
        streamed = open_streamed(candidate, comparison.device, comparison.dtype)
        model = StreamedLogits(adapted(streamed, adapter_of(candidate)))
    elif cache:
        streamed = open_streamed(candidate, comparison.device, comparison.dtype)
        model = StreamedLogits(streamed.caching(CodedStates(read_books(candidate), candidate.config)))
    else:
        model = open_for_logits(candidate, comparison.device, comparison.dtype)
    model.prepare(batches, progress, label)
    measured = []
    with model.head() as head, _teacher(comparison, batches, kept, label, vocabulary) as teacher:
        for index, batch in enumerate(batches):
            if chosen is None:
                where, targets = _predicted(batch, comparison.device, reads_and_writes(candidate.config))
            else:
                own = slice(index * rows, index * rows + len(batch.input_ids))
                where = chosen[own].nonzero().to(comparison.device)
                targets = text.input_ids[own][chosen[own]].to(comparison.device)
            slices = [slice(start, start + at_once) for start in range(0, max(1, len(targets)), at_once)]
            logits = finite(model.logits(head, index), candidate)
            for part, theirs in zip(slices, teacher(index, where, targets, slices), strict=True):
                found = _compare(_log_probs(logits, where[part], vocabulary), theirs, targets[part])
                place = where[part, 1] + (chosen is None)  # of the token that is predicted
                measured.append({**found, "row": where[part, 0] + index * rows, "position": place})
    if kept is not None and not kept.complete:
        kept.finish()
    arrays = {name: torch.cat([m[name] for m in measured]).cpu().numpy() for name in measured[0]}
    return Divergence(**arrays, teacher="live" if kept is None else kept.described(vocabulary))


def _vocabulary(candidate: Checkpoint, baseline: Checkpoint) -> int:
    """
    The ids that are compared: all, or where the vocabularies of one tokenizer are padded to other lengths those of both.

    Raises:
        CheckpointError: they are of two tokenizers.
    """
    ours, theirs = (c.config.get_text_config().vocab_size for c in (candidate, baseline))
    if ours == theirs:
        return ours
    try:
        return shared_vocabulary(candidate, baseline)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}, or give the baseline that it was made from.") from error


def _cache(comparison: Comparison, tokens: Tokens, batches: int, vocabulary: int) -> TeacherCache | None:
    if comparison.teacher_cache is None:
        return None
    whole = comparison.baseline.config.get_text_config().vocab_size
    key = {
        **({} if vocabulary == whole else {"vocabulary": vocabulary}),
        **({"masked": comparison.seed} if predicts_masked(comparison.baseline.config) else {}),
        "baseline": comparison.baseline_sha256,
        "tokens": tokens.sha256,
        "dtype": str(comparison.dtype),
        "device": comparison.device.type,
    }
    return TeacherCache(comparison.teacher_cache, key, batches)


@contextlib.contextmanager
def _teacher(comparison: Comparison, batches: list[Batch], cache: TeacherCache | None, label: str, vocabulary: int):
    """A function that gives the baseline's distributions for the slices of a batch: computed, or from the cache."""
    if cache is not None and cache.complete:
        comparison.progress.step(f"{label}: the original, from the cache", comparison.blocks)

        def read(index: int, where: Tensor, targets: Tensor, slices: list[slice]) -> Iterator[Distributions]:
            found = cache.read(index, comparison.device)
            yield from (found[part] for part in slices)

        yield read
        return
    model = open_for_logits(comparison.baseline, comparison.device, comparison.dtype)
    model.prepare(batches, comparison.progress, f"{label}: the original")
    with model.head() as head:

        def compute(index: int, where: Tensor, targets: Tensor, slices: list[slice]) -> Iterator[Distributions]:
            logits = finite(model.logits(head, index), comparison.baseline)
            kept = []
            for part in slices:
                log_probs = _log_probs(logits, where[part], vocabulary)
                found = Distributions(log_probs, log_probs.gather(-1, targets[part, None])[:, 0])
                if cache is not None:
                    found = found.kept()
                    kept.append(found)
                yield found
            if cache is not None:
                cache.write(index, Distributions.joined(kept))

        yield compute


def _predicted(batch: Batch, device: torch.device, said: bool) -> tuple[Tensor, Tensor]:
    """
    The row and position `(n, 2)` of every token that another one precedes, one before it; and those tokens `(n,)`. If `said`, of
    those alone that a decoder reads.
    """
    own = batch.read - batch.heard if said else 0
    targets = batch.input_ids[:, own + 1 :]
    kept = torch.ones_like(targets, dtype=torch.bool)
    if batch.mask is not None:
        kept = batch.mask[:, own + 1 :] & batch.mask[:, own:-1]
    return kept.nonzero().to(device), targets[kept].to(device)


def _log_probs(logits: Tensor, where: Tensor, vocabulary: int) -> Tensor:
    """Log-probabilities `(n, vocabulary)` in float32 at some rows and positions `(n, 2)`, of the first so many ids."""
    return torch.log_softmax(logits[where[:, 0], where[:, 1], :vocabulary].float(), -1)


def _compare(ours: Tensor, teacher: Distributions, targets: Tensor) -> dict[str, Tensor]:
    """A slice's part of a [`Divergence`]; `ours` are log-probabilities `(n, vocabulary)`."""
    top = ours.max(-1)
    best, baseline_confidence = teacher.best()
    target = ours.gather(-1, targets[:, None])[:, 0]
    return {
        "kl": teacher.divergence(ours).double(),
        "nll": -target.double(),
        "baseline_nll": -teacher.target.double(),
        "agree": top.indices == best,
        "target_change": target.double().exp() - teacher.target.double().exp(),
        "confidence": top.values.exp(),
        "baseline_confidence": baseline_confidence,
        "correct": top.indices == targets,
        "baseline_correct": best == targets,
    }
