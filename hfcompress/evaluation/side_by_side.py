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
"""What the two models make of the same prompts: a reader sees at once whether the compressed one still talks."""

from typing import Any

import numpy as np
import psutil
import torch

from hfcompress.evaluation.comparison import Comparison, whole_model
from hfcompress.evaluation.rows import starts
from hfcompress.evaluation.stability import generate
from hfcompress.models.architecture import goes_on


PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 2, 32, 48
CPU_WEIGHTS = 2_000_000_000  # above this many a CPU takes minutes for a few words


def side_by_side(comparison: Comparison) -> list[dict[str, str]] | None:
    """
    Greedy continuations of a few rows' beginnings.

    Returns:
        `list[dict]` or `None`: `prompt`, `baseline` and `compressed`, as text, or as token ids where there is no
        tokenizer; `None` of a model with an encoder, and where the whole model does not fit in half of the free memory, or would take minutes.
    """
    if not goes_on(comparison.candidate.config) or not _is_quick(comparison):
        return None
    whole = PROMPT_TOKENS + NEW_TOKENS
    places = min(
        getattr(c.config.get_text_config(), "max_position_embeddings", None) or whole for _, c in comparison.models
    )
    prompts = starts(comparison.tokens, min(PROMPT_TOKENS, places // 2), comparison.seed)[:PROMPTS]
    new_tokens = min(NEW_TOKENS, places - prompts.shape[1])
    written = {name: _written(comparison, checkpoint, prompts, new_tokens) for name, checkpoint in comparison.models}
    return shown(comparison, prompts, written)


def shown(comparison: Comparison, prompts: np.ndarray, written: dict[str, np.ndarray]) -> list[dict[str, str]]:
    """Prompts `(rows, prompt_len)` and continuations `(rows, tokens)` as a report shows them."""
    tokenizer = comparison.baseline.tokenizer

    def text(ids: np.ndarray) -> str:
        return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids.tolist())

    return [
        {"prompt": text(prompt), **{name: text(rows[index]) for name, rows in written.items()}}
        for index, prompt in enumerate(prompts)
    ]


def _written(comparison: Comparison, checkpoint: Any, prompts: np.ndarray, new_tokens: int) -> np.ndarray:
    with whole_model(checkpoint, comparison.device, comparison.dtype) as model:
        return generate(model, prompts, new_tokens)


def _is_quick(comparison: Comparison) -> bool:
    weights = sum(np.prod(tensor.shape) for tensor in comparison.baseline.tensors.values())
    needed = 2 * weights * comparison.dtype.itemsize
    if comparison.device.type == "cuda":
        return needed < torch.cuda.mem_get_info(comparison.device)[0] // 2
    return weights < CPU_WEIGHTS and needed < psutil.virtual_memory().available // 2
