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
What the solved model says to a few tokens, taken while it is solved: anyone who reloads the folder can ask it the same
and compare.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.batch import Batch, made_up
from hfcompress.models.streaming import Stream, StreamedModel


TOKENS = 32
TOP = 4
SEED = 0


def witness_ids(model: StreamedModel) -> Tensor:
    """Seeded token ids: int64 `(1, tokens)`, as many as fit in the context."""
    config = model.skeleton.config.get_text_config()
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(SEED))


def witness_batch(model: StreamedModel) -> Batch:
    """A row of them, and where the model hears always the same noise."""
    return made_up(model.skeleton.config, witness_ids(model))


@torch.no_grad()
def testimony_of(model: StreamedModel, whole: nn.Module) -> dict[str, Any]:
    """[`testimony`] of a model whose weights are all in memory, from [`StreamedModel.loaded`]."""
    stream = model.stream(whole, witness_batch(model))
    stream = stream.advanced(model.final_hidden(whole, stream.batch))
    return testimony(stream, model.logits(whole, stream))


def testimony(witness: Stream, logits: Tensor) -> dict[str, Any]:
    """
    Args:
        witness (`Stream`): the tokens, having passed every solved block.
        logits (`Tensor`): `(1, tokens, vocabulary)`.

    Returns:
        `dict`: `input_ids`; for every position the ids of the largest logits, `top_ids`, and their log-probabilities,
        `top_log_probs`; and the `dtype` of the arithmetic.

    Raises:
        UnsupportedModelError: a logit is not finite.
    """
    if not torch.isfinite(logits).all():
        raise UnsupportedModelError(
            f"In {logits.dtype} the solved model's logits are not finite; give --dtype float32 or bfloat16.".replace(
                "torch.", ""
            )
        )
    top = torch.log_softmax(logits[0].float(), -1).topk(min(TOP, logits.shape[-1]))
    return {
        "input_ids": witness.batch.input_ids[0].tolist(),
        "top_ids": top.indices.tolist(),
        "top_log_probs": [[round(value, 6) for value in row] for row in top.values.tolist()],
        "dtype": str(logits.dtype).removeprefix("torch."),
    }
