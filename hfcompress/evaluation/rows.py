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
"""Rows of tokens, and what was found along them: what the measurements on text share."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hfcompress.calibration.tokens import DEFAULT_CONTEXT, Tokens
from hfcompress.evaluation.quality import Divergence, clustered
from hfcompress.models.checkpoint import Checkpoint


def unpadded(tokens: Tokens) -> list[np.ndarray]:
    """The rows without their padding: int64 `(length,)` each."""
    if tokens.mask is None:
        return list(tokens.input_ids)
    return [row[mask] for row, mask in zip(tokens.input_ids, tokens.mask, strict=True)]


def starts(tokens: Tokens, length: int, seed: int) -> np.ndarray:
    """
    The first tokens of the rows that have as many as asked for, padding left out, in a seeded order.

    Args:
        tokens (`Tokens`): the rows.
        length (`int`): how many tokens; as many as the longest row has if that is less.
        seed (`int`): of the order.

    Returns:
        `np.ndarray`: int64 `(rows, length)`, at least one row.
    """
    rows = unpadded(tokens)
    length = min(length, max(len(row) for row in rows))
    long = np.stack([row[:length] for row in rows if len(row) >= length])
    return long[np.random.default_rng(seed).permutation(len(long))]


def context_length(checkpoint: Checkpoint) -> int:
    """How many tokens the model can read."""
    return getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT


def by_position(found: Divergence, edges: Sequence[int]) -> list[dict[str, Any]]:
    """
    KL between consecutive `edges`: positions from `from` up to, but not including, `to`; empty buckets are left out.

    Args:
        found (`Divergence`): the two models over some rows.
        edges (`Sequence[int]`): ascending positions.
    """
    buckets = []
    for low, high in itertools.pairwise(edges):
        inside = (found.position >= low) & (found.position < high)
        if inside.any():
            mean, error = clustered(found.kl[inside], found.row[inside])
            buckets.append({"from": int(low), "to": int(high), "kl_mean": mean, "kl_mean_stderr": error})
    return buckets
