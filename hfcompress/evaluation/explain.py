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
Which blocks hurt: two models side by side, block by block.

Both are streamed, so one block of each is in memory at a time. To know what each block does to the predictions when it
alone is the candidate's, every block starts a stream of its own: the baseline's hidden states after the candidate's
block. All of these go on together through the baseline's later blocks while those are loaded, so the weights are read
once, and of hidden states there are as many as blocks; the number of rows is chosen for them to fit.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError, UnsupportedModelError
from hfcompress.evaluation.attention_maps import eager
from hfcompress.evaluation.block_pair import BlockPair, not_padding
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.logits import open_streamed
from hfcompress.evaluation.quality import LOGIT_BYTES, clustered
from hfcompress.formats.reading import is_streamed
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.rotated_tensor import unrounded
from hfcompress.models.rotation import rotated
from hfcompress.models.streaming import Stream, StreamedModel


ROWS = 16  # at most
SEQ_LEN = 512  # at most: eager attention takes its square
HIDDEN_BYTES = 1 << 32  # of all streams' hidden states
ATTENTION_BYTES = 1 << 28  # of one batch's attention maps in float32
POSITIONS = 128  # whose distributions are compared at once
MUST_AGREE = {
    "num_hidden_layers": "{} decoder blocks",
    "hidden_size": "a hidden size of {}",
    "vocab_size": "a vocabulary of {}",
}


def units(comparison: Comparison) -> int:
    """Steps that [`measure`] will report: each block, each later block of each stream, and each batch of logits."""
    blocks = comparison.blocks
    return blocks + blocks * (blocks - 1) // 2 + len(_batches(comparison, _rows(comparison)))


@torch.no_grad()
def measure(comparison: Comparison) -> dict[str, Any]:
    """
    Compare every block of a model with the same block of the one that it was made from.

    Returns:
        `dict`: `blocks`, for each block

        - `relative_error`: of its output, `||h_c - h_b|| / ||h_b||`, each model along its own stream;
        - `relative_error_alone`: the same with the baseline's hidden states going into both;
        - `attention_distance`: total variation, each model along its own stream, mean over heads, or `None`;
        - `kl_swapped_in`, `kl_swapped_in_stderr`: KL(baseline || baseline with this one block of the candidate), nats;

        `attention`, the distance per block and head (`None` for a head without a map, and for all if none has one);
        `linears`, the error of each linear's output that the manifest knows (on its calibration data); and `how`.

    Raises:
        UnsupportedModelError: a model that cannot be streamed, or models that have not the same blocks.
        CalibrationError: no row has two tokens that follow each other.
    """
    _require_comparable(comparison)
    tokens = _rows(comparison)
    batches = _batches(comparison, tokens)
    baseline, candidate = (
        open_streamed(eager(c), comparison.device, comparison.dtype)
        for c in (_alike(comparison), comparison.candidate)
    )
    streams, own = baseline.embed(batches), candidate.embed(batches)
    swapped: list[list[Stream]] = []
    blocks, attention = [], []
    for index, name in enumerate(baseline.block_names):
        label = f"explaining: block {index + 1} of {len(baseline)}"
        with baseline.block(index) as block, candidate.block(index) as other:
            for number, variant in enumerate(swapped):
                swapped[number] = [s.advanced(baseline.call(block, index, s)) for s in variant]
                comparison.progress.step(label)
            pair = BlockPair(baseline, block, candidate, other, index)
            compared = [pair.advance(*both) for both in zip(streams, own, strict=True)]
            comparison.progress.step(label)
        streams, own, started = (list(found) for found in zip(*compared, strict=True))
        swapped.append(started)
        attention.append(pair.attention.result())
        blocks.append({"block": index, "name": name, **pair.results()})
    kl, row = _divergences(baseline, streams, swapped, comparison)
    for entry, values in zip(blocks, kl, strict=True):
        entry["kl_swapped_in"], entry["kl_swapped_in_stderr"] = clustered(values, row)
    linears, elsewhere = _linears(comparison, candidate.block_names)
    return {
        "blocks": blocks,
        "attention": _rectangle(attention),
        "linears": linears,
        "how": _how(comparison, tokens, len(row), _missing(attention, linears, elsewhere)),
    }


# what is compared


def _require_comparable(comparison: Comparison) -> None:
    candidate, baseline = comparison.candidate, comparison.baseline
    for checkpoint in (candidate, baseline):
        config = checkpoint.quantization_config
        if config is not None and not is_streamed(config):
            raise UnsupportedModelError(
                f"{checkpoint.name} is quantized by {config.get('quant_method')}, which cannot be read block by block; "
                "leave explain out of --measure."
            )
    for key, text in MUST_AGREE.items():
        found, expected = (getattr(c.config.get_text_config(), key) for c in (candidate, baseline))
        if found != expected:
            raise UnsupportedModelError(
                f"{candidate.name} has {text.format(found)} and {baseline.name} has {text.format(expected)}, so "
                "their blocks cannot be compared; give the baseline that it was made from, or leave explain out of "
                "--measure."
            )


def _alike(comparison: Comparison) -> Checkpoint:
    """The baseline, with its residual stream rotated if the candidate's is: only so are hidden states comparable."""
    done = comparison.manifest.get("rotation") or {}
    if not done.get("hidden"):
        return comparison.baseline
    found = None
    if comparison.baseline.quantization_config is None:
        found = rotated(comparison.baseline, heads=False, seed=int(done["seed"]), device=comparison.device).checkpoint
    if found is None:
        raise UnsupportedModelError(
            f"The residual stream of {comparison.candidate.name} is rotated and that of {comparison.baseline.name} "
            "cannot be, so their blocks cannot be compared; give the baseline that it was made from, or leave explain "
            "out of --measure."
        )
    found.tensors = unrounded(found.tensors, found.tensors)
    return found


def _rows(comparison: Comparison) -> Tokens:
    """A few rows, drawn by the seed, as many as the budget allows: the first tokens of each that are no padding."""
    tokens, config = comparison.tokens, comparison.baseline.config.get_text_config()
    length = min(SEQ_LEN, tokens.input_ids.shape[1])
    streams = comparison.blocks + 2
    row_bytes = streams * length * config.hidden_size * comparison.dtype.itemsize
    mask = np.ones(tokens.input_ids.shape, dtype=bool) if tokens.mask is None else tokens.mask
    first = np.minimum(mask.argmax(1), mask.shape[1] - length)
    window = first[:, None] + np.arange(length)
    ids, mask = (np.take_along_axis(array, window, 1) for array in (tokens.input_ids, mask))
    usable = np.flatnonzero((mask[:, 1:] & mask[:, :-1]).any(1))
    if len(usable) == 0:
        raise CalibrationError(
            f"No row of {tokens.source} has two tokens that follow each other and are no padding, so nothing is "
            "predicted; give longer rows."
        )
    count = max(1, min(ROWS, HIDDEN_BYTES // row_bytes))
    drawn = np.sort(np.random.default_rng(comparison.seed).permutation(usable)[:count])
    return Tokens(ids[drawn], tokens.source, mask[drawn])


def _batches(comparison: Comparison, tokens: Tokens) -> list[Batch]:
    """Pieces of which neither the attention maps nor the logits take much memory."""
    config, seq_len = comparison.baseline.config.get_text_config(), tokens.input_ids.shape[1]
    heads = getattr(config, "num_attention_heads", None) or 1
    by_attention = ATTENTION_BYTES // (4 * heads * seq_len**2)
    by_logits = LOGIT_BYTES // (4 * seq_len * config.vocab_size)
    return tokens.batch().split(max(1, min(by_attention, by_logits)))


# the predictions


def _divergences(
    baseline: StreamedModel, streams: list[Stream], swapped: list[list[Stream]], comparison: Comparison
) -> tuple[list[np.ndarray], np.ndarray]:
    """KL from the baseline at every predicted position, for each of the other streams; and the positions' rows."""
    found: list[list[np.ndarray]] = [[] for _ in swapped]
    rows, first = [], 0
    with baseline.outside(head=True) as model:
        for number, stream in enumerate(streams):
            mask = not_padding(stream)
            kept = mask[:, 1:] & mask[:, :-1]
            expected = baseline.logits(model, stream)[:, :-1][kept]
            for values, variant in zip(found, swapped, strict=True):
                values.append(_kl(expected, baseline.logits(model, variant[number])[:, :-1][kept]))
            rows.append(kept.nonzero()[:, 0].cpu().numpy() + first)
            first += len(mask)
            comparison.progress.step(f"explaining: predictions {number + 1} of {len(streams)}")
    return [np.concatenate(values) for values in found], np.concatenate(rows)


def _kl(expected: Tensor, logits: Tensor) -> np.ndarray:
    """
    KL in nats, float64 `(n,)`, from logits `(n, vocabulary)`. One block changes little: in float32 the rounding of the
    normalizers alone, about 1e-7, would show.
    """
    parts = []
    for pair in zip(expected.split(POSITIONS), logits.split(POSITIONS), strict=True):
        ours, theirs = (x.double().log_softmax(-1) for x in pair)
        parts.append((ours.exp() * (ours - theirs)).sum(-1))
    return torch.cat(parts).cpu().numpy()


# what is reported


def _linears(comparison: Comparison, block_names: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The manifest's linears by block, and the names of those that are in none."""
    found, elsewhere = [], []
    for linear in comparison.manifest.get("linears", []):
        for index, block_name in enumerate(block_names):
            if linear["name"].startswith(f"{block_name}."):
                name = linear["name"].removeprefix(f"{block_name}.")
                error = linear.get("relative_output_error")
                found.append({"block": index, "linear": name, "relative_output_error": error})
                break
        else:
            elsewhere.append(linear["name"])
    return found, elsewhere


def _rectangle(attention: list[list[float] | None]) -> list[list[float | None]] | None:
    """As many heads for each block, `None` for those that have no map; `None` if no block has any."""
    heads = max((len(distances) for distances in attention if distances is not None), default=0)
    if heads == 0:
        return None
    return [[*(distances or []), *[None] * (heads - len(distances or []))] for distances in attention]


def _missing(attention: list[list[float] | None], linears: list[dict[str, Any]], elsewhere: list[str]) -> list[str]:
    """Sentences on what could not be measured."""
    missing = []
    without = [str(index) for index, distances in enumerate(attention) if distances is None]
    if without:
        missing.append(
            f"attention_distance: blocks {', '.join(without)} of the two models return no attention maps of the same "
            "heads"
        )
    if elsewhere:
        missing.append(f"linears: {', '.join(elsewhere)} outside the blocks")
    if not linears:
        missing.append("linears: the candidate has no hfcompress.json that tells of any")
    elif any(linear["relative_output_error"] is None for linear in linears):
        missing.append("linears: no output error where a linear was compressed without calibration data")
    return missing


def _how(comparison: Comparison, tokens: Tokens, predicted: int, missing: list[str]) -> dict[str, Any]:
    rows, seq_len = tokens.input_ids.shape
    return {
        "data": tokens.source,
        "rows": rows,
        "rows_available": len(comparison.tokens.input_ids),
        "seq_len": seq_len,
        "tokens": tokens.count,
        "predicted_positions": predicted,
        "seed": comparison.seed,
        "dtype": str(comparison.dtype).removeprefix("torch."),
        "device": str(comparison.device),
        "baseline": comparison.baseline.name,
        "attention_implementation": "eager",
        "attention": "total variation between the attention probabilities of the two models, each along its own "
        "stream, mean over queries, per head: 0 is alike, 1 is nothing in common",
        "kl_swapped_in": "KL(baseline || baseline with this block of the candidate), nats, mean over predicted "
        "positions, standard error clustered by row; embeddings, final norm and head are the baseline's",
        "missing": missing,
    }
