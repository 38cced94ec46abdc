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
The vectors that keys and values are kept as: for every few channels of a head those of least squared error (k-means) on what the
finished model's own attentions cache over the calibration data.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hfcompress.errors import CalibrationError, InvalidValueError, UnsupportedModelError
from hfcompress.models.batch import Batch
from hfcompress.models.streaming import StreamedModel
from hfcompress.progress import Progress
from hfcompress.runtime.vector_cache import ENTRIES
from hfcompress.solvers.k_means import k_means


POINTS = 1 << 13  # tokens that vectors are learned from
TOKENS = 8 * POINTS  # that go through the model for it
BATCH_TOKENS = 2048


class Watched(DynamicCache):
    """
    Keeps some tokens' keys and values of one block at a time, and gives all back as they are.

    Args:
        share (`float`): of the tokens that are kept.
        seed (`int`): of which those are.
    """

    def __init__(self, config, share: float, seed: int):
        super().__init__(config=config)
        self.share, self.generator = share, torch.Generator().manual_seed(seed)
        self.mask: Tensor | None = None
        self.seen: dict[int, list[tuple[Tensor, ...]]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """What an attention calls."""
        rows, _, tokens, _ = key_states.shape
        kept = torch.rand(rows, tokens, generator=self.generator) < self.share
        kept = kept if self.mask is None else kept & self.mask.cpu()
        both = tuple(
            states.transpose(1, 2)[kept.to(states.device)].float().cpu() for states in (key_states, value_states)
        )
        self.seen.setdefault(layer_idx, []).append(both)
        return key_states, value_states


def check_cache(model: StreamedModel, batch: Batch, bits: int, memory_limit: int | None) -> None:
    """
    Before any work: whether vectors can be learned; see [`learn_vectors`] for the arguments.

    Raises:
        InvalidValueError: a limit on memory, which nothing keeps here.
        CalibrationError: fewer tokens than vectors.
        UnsupportedModelError: no attention caches keys and values of all tokens, or their heads cannot be divided.
    """
    if memory_limit is not None:
        raise InvalidValueError(
            f"The vectors of kv_cache are learned with the hidden states of up to {TOKENS:,} tokens in memory, which --memory-limit "
            "does not bound; leave out one of the two."
        )
    tokens = int(batch.input_ids.numel() if batch.mask is None else batch.mask.sum())
    if tokens < ENTRIES:
        raise CalibrationError(
            f"kv_cache learns {ENTRIES} vectors, and there are {tokens} calibration tokens; give more with --samples or --seq-len."
        )
    if not _whole(model):
        raise UnsupportedModelError(
            f"{model.checkpoint.name} has no attention that caches all tokens' keys and values; leave out the step kv_cache."
        )
    config = model.skeleton.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width % (8 // bits):
        raise UnsupportedModelError(
            f"The heads of {model.checkpoint.name} are {width} wide, which vectors of {8 // bits} do not divide; give "
            "kv_cache more bits."
        )


def _whole(model: StreamedModel) -> set[int]:
    """The layers that cache all tokens."""
    layers = DynamicCache(config=model.skeleton.config).layers
    return {index for index, layer in enumerate(layers) if type(layer) is DynamicLayer}


@torch.no_grad()
def learn_vectors(
    model: StreamedModel, batch: Batch, bits: int, dtype: torch.dtype, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """
    Args:
        model (`StreamedModel`): the finished model.
        batch (`Batch`): the calibration data, of which the first rows are used.
        bits (`int`): of a channel: 1, 2, 4 or 8.
        dtype (`torch.dtype`): in which vectors are stored.
        seed (`int`): of what is drawn.
        progress (`Progress`): is told every block.

    Returns:
        `dict[str, Tensor]`: what [`hfcompress.runtime.vector_cache`] reads.

    Raises:
        CalibrationError: keys or values that are not finite.
        UnsupportedModelError: the attentions do not hand them to transformers' cache.
    """
    seq_len = batch.input_ids.shape[1]
    [batch, *_] = batch.split(max(1, TOKENS // seq_len))
    tokens = int(batch.input_ids.numel() if batch.mask is None else batch.mask.sum())
    watched, whole = Watched(model.skeleton.config, min(1.0, POINTS / tokens), seed), _whole(model)
    watching = model.caching(watched)
    streams = watching.embed(batch.split(max(1, BATCH_TOKENS // seq_len)))
    found: dict[str, Tensor] = {}
    for index in range(len(model)):
        progress.step(f"the cache: block {index + 1} of {len(model)}")
        with model.block(index) as block:
            for number, stream in enumerate(streams):
                watched.mask = stream.batch.mask
                streams[number] = stream.advanced(watching.call(block, index, stream))
        for layer, seen in watched.seen.items():
            if layer in whole:
                for kind, states in zip(("keys", "values"), zip(*seen, strict=True), strict=True):
                    found[f"layers.{layer}.{kind}"] = _book(torch.cat(states), bits, seed, layer).to(dtype)
        watched.seen.clear()
    if not found:
        raise UnsupportedModelError(
            f"The attentions of {model.checkpoint.name} keep keys and values of their own; leave out the step kv_cache."
        )
    return found


def _book(states: Tensor, bits: int, seed: int, layer: int) -> Tensor:
    """Vectors for states `(tokens, heads, head_dim)`, float32 `(heads, groups, 256, length)`."""
    if not states.isfinite().all():
        raise CalibrationError(
            f"The keys or values of layer {layer} hold NaN or infinity; try --dtype float32, and check that the model works "
            "on this calibration data."
        )
    tokens, heads, width = states.shape
    length = 8 // bits
    points = states.view(tokens, heads * (width // length), length).transpose(0, 1)
    same = torch.ones(1, length).expand(tokens, length)
    vectors = [k_means(each.contiguous(), same, ENTRIES, seed, "split") for each in points]
    return torch.stack(vectors).view(heads, width // length, ENTRIES, length)
