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
"""What an encoder is asked: to tell some of the tokens of a text, which are masked, from the others."""

import torch
from torch import Tensor

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint


SHARE = 0.15  # of the tokens: what encoders are trained on (Devlin et al. 2019)


def mask_id(checkpoint: Checkpoint) -> int:
    """
    The id that stands in the place of a token.

    Raises:
        UnsupportedModelError: the tokenizer has none, or there is no tokenizer.
    """
    found = None if checkpoint.tokenizer is None else checkpoint.tokenizer.mask_token_id
    if found is None:
        raise UnsupportedModelError(
            f"{checkpoint.name} predicts tokens that are masked, and has no tokenizer that says how; put its tokenizer files beside "
            "it, or leave the measuring out: --no-eval."
        )
    return found


def masked(batch: Batch, instead: int, seed: int) -> tuple[Batch, Tensor]:
    """
    Args:
        batch (`Batch`): the text.
        instead (`int`): the id that stands in the place of a token.
        seed (`int`): of which tokens those are.

    Returns:
        the batch as the model gets it, and which of its tokens are masked, bool `(rows, seq_len)`; in every row at least one.
    """
    drawn = torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(seed))
    if batch.mask is not None:
        drawn = drawn.masked_fill(~batch.mask, 2.0)
    chosen = drawn < torch.maximum(torch.tensor(SHARE), drawn.amin(1, keepdim=True) * 1.000001)
    chosen &= drawn < 1.5
    return Batch(batch.input_ids.masked_fill(chosen, instead), batch.mask), chosen
