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
Adversarial token swaps (HotFlip: Ebrahimi et al. 2018), found on the original and shown to both models.

A row's first half is attacked, and the loss is the mean negative log-likelihood of its second half, which stays as it
is: what is scored is never what was swapped. The gradient of the loss with respect to a token's one-hot vector
estimates what every replacement would do (their section 3, with a token where they have a character); the most
promising one at each of the most promising places is tried, and the best is kept if the loss really rose.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError, UnsupportedModelError
from hfcompress.evaluation.comparison import Comparison, whole_model
from hfcompress.evaluation.quality import Divergence, clustered, diverge


MAX_PARAMETERS = 200_000_000
ROWS = 8
LENGTH = 128  # tokens per row, of which half are attacked
SWAPS = 8
CANDIDATES = 8  # places that are tried for every swap that is made
STATES = ("before", "after", "random")


def units(comparison: Comparison) -> int:
    """Steps that [`measure`] will report."""
    return ROWS + 2 * comparison.blocks


def measure(comparison: Comparison, ids: np.ndarray) -> dict[str, Any]:
    """
    Args:
        comparison (`Comparison`): the models; the original is attacked.
        ids (`np.ndarray`): int64 `(rows, seq_len)`, full rows; the first of them are used, as far as needed.

    Returns:
        `dict`: the mean negative log-likelihood (nats) of the rows' second halves under both models and the KL between
        them `before` and `after` the attack and after as many `random` swaps, with standard errors clustered by row;
        `swaps`, how many were allowed per row, and `swaps_made`, how many were made on average.

    Raises:
        UnsupportedModelError: the original is too large.
        CalibrationError: the rows are too short.
    """
    parameters = sum(int(np.prod(tensor.shape)) for tensor in comparison.baseline.tensors.values())
    if parameters > MAX_PARAMETERS:
        raise UnsupportedModelError(
            f"{comparison.baseline.name} has {parameters / 1e6:.0f} million parameters; adversarial swaps are searched "
            f"for on models of up to {MAX_PARAMETERS / 1e6:.0f} million."
        )
    rows = ids[:ROWS, :LENGTH]
    if rows.shape[1] < 4:
        raise CalibrationError(f"Rows of {rows.shape[1]} tokens are too short to attack; give longer evaluation text.")
    allowed = _allowed(comparison)
    attacked = _attacked(comparison, rows, allowed)
    made = (attacked != rows).sum(axis=1)
    randomized = random_swaps(rows, made, allowed.numpy(), np.random.default_rng(comparison.seed))
    states = Tokens(np.concatenate([rows, attacked, randomized]), "adversarial swaps")
    found = diverge(comparison, states, "adversarial swaps")
    results: dict[str, Any] = {"swaps": SWAPS, "swaps_made": float(made.mean()), "rows": len(rows)}
    for index, state in enumerate(STATES):
        results |= _results(found, state, index * len(rows), len(rows), rows.shape[1] // 2)
    return results


def _attacked(comparison: Comparison, rows: np.ndarray, allowed: Tensor) -> np.ndarray:
    """The rows after [`hotflip`] on the original, which is in memory no longer than this takes."""
    attacked = rows.copy()
    with whole_model(comparison.baseline, comparison.device, torch.float32) as model:
        model.requires_grad_(False)
        for index, row in enumerate(rows):
            swapped = hotflip(model, torch.from_numpy(row).to(model.device), allowed.to(model.device))
            attacked[index] = swapped.cpu().numpy()
            comparison.progress.step(f"adversarial swaps: row {index + 1} of {len(rows)}")
    comparison.progress.step("adversarial swaps", ROWS - len(rows))
    return attacked


def _allowed(comparison: Comparison) -> Tensor:
    """Token ids that may be put in: all that stand for text, as far as the tokenizer tells."""
    vocabulary = comparison.baseline.config.get_text_config().vocab_size
    tokenizer = comparison.baseline.tokenizer
    known, special = (vocabulary, []) if tokenizer is None else (len(tokenizer), tokenizer.all_special_ids)
    ids = torch.arange(min(vocabulary, known))
    return ids[~torch.isin(ids, torch.tensor(special, dtype=ids.dtype))]


def _results(found: Divergence, state: str, first_row: int, rows: int, half: int) -> dict[str, float | None]:
    inside = (found.row >= first_row) & (found.row < first_row + rows) & (found.position >= half)
    results = {}
    for key, values in (("baseline_nll", found.baseline_nll), ("compressed_nll", found.nll), ("kl", found.kl)):
        mean, error = clustered(values[inside], found.row[inside])
        results |= {f"{key}_{state}": mean, f"{key}_{state}_stderr": error}
    return results


def hotflip(
    model: PreTrainedModel, ids: Tensor, allowed: Tensor, swaps: int = SWAPS, candidates: int = CANDIDATES
) -> Tensor:
    """
    Greedy swaps, each at a place of its own in the first half of the row, until none of those tried raises the loss.

    Args:
        model (`PreTrainedModel`): whose loss is raised.
        ids (`Tensor`): int64 `(seq_len,)`.
        allowed (`Tensor`): int64 `(n,)`, the token ids that may be put in.
        swaps (`int`, *optional*): at most so many.
        candidates (`int`, *optional*): places tried for each.

    Returns:
        `Tensor`: int64 `(seq_len,)`, the attacked row.
    """
    half = len(ids) // 2
    ids = ids.clone()
    table = model.get_input_embeddings()(allowed).detach()  # (n, hidden_size), scaled as the model scales them
    fixed = torch.zeros(half, dtype=torch.bool, device=ids.device)
    with torch.no_grad():
        loss = second_half_nll(model, ids[None])
    for _ in range(min(swaps, half)):
        gain = first_order_gain(model, ids, table)
        gain[fixed] = -torch.inf
        gain[ids[:half, None] == allowed] = -torch.inf
        gain, replacement = gain.max(-1)  # the best one for every place
        position = gain.topk(min(candidates, half)).indices
        position = position[gain[position].isfinite()]
        if not len(position):
            break
        tried = ids.repeat(len(position), 1)
        tried[torch.arange(len(position)), position] = allowed[replacement[position]]
        with torch.no_grad():
            losses = second_half_nll(model, tried)
        best = int(losses.argmax())
        if losses[best] <= loss:
            break
        ids, loss = tried[best], losses[best]
        fixed[position[best]] = True
    return ids


def first_order_gain(model: PreTrainedModel, ids: Tensor, table: Tensor) -> Tensor:
    """
    What every replacement in the first half would add to the loss, to first order: `(seq_len // 2, n)`, nats.

    Args:
        model (`PreTrainedModel`): the model.
        ids (`Tensor`): int64 `(seq_len,)`.
        table (`Tensor`): `(n, hidden_size)`, the embeddings of the replacements.
    """
    half = len(ids) // 2
    embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
    with torch.enable_grad():
        loss = second_half_nll(model, ids[None], embedded).sum()
    gradient = torch.autograd.grad(loss, embedded)[0][0, :half]
    return gradient @ table.T - (gradient * embedded[0, :half].detach()).sum(-1, keepdim=True)


def second_half_nll(model: PreTrainedModel, ids: Tensor, embedded: Tensor | None = None) -> Tensor:
    """
    Mean negative log-likelihood of the second half of each row, given what comes before: `(rows,)`, nats.

    Args:
        model (`PreTrainedModel`): the model.
        ids (`Tensor`): int64 `(rows, seq_len)`.
        embedded (`Tensor`, *optional*): their embeddings `(rows, seq_len, hidden_size)`, to differentiate by.
    """
    half = ids.shape[1] // 2
    inputs = {"input_ids": ids} if embedded is None else {"inputs_embeds": embedded}
    logits = model(**inputs, use_cache=False).logits[:, half - 1 : -1].float()
    return cross_entropy(logits.transpose(1, 2), ids[:, half:], reduction="none").mean(1)


def random_swaps(rows: np.ndarray, counts: Sequence[int], allowed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    The control: as many swaps in the first half of every row, at random places, to random tokens.

    Args:
        rows (`np.ndarray`): int64 `(rows, seq_len)`.
        counts (`Sequence[int]`): swaps per row.
        allowed (`np.ndarray`): int64 `(n,)`, at least two token ids.
        rng (`np.random.Generator`): what is drawn from.
    """
    swapped = rows.copy()
    for row, count in zip(swapped, counts, strict=True):
        for place in rng.permutation(rows.shape[1] // 2)[:count]:
            row[place] = rng.choice(allowed[allowed != row[place]])
    return swapped
