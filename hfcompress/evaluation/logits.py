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
"""What a model says to tokens: block by block where that is the model, otherwise whole; of one without a head its states."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.calibration.own_output import answered, continued
from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CheckpointError, InvalidValueError
from hfcompress.evaluation.comparison import whole_model
from hfcompress.formats.reading import decoded, is_streamed
from hfcompress.models.architecture import answers
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.encoder_decoder import block_count, hears, reads_and_writes
from hfcompress.models.streaming import StreamedModel
from hfcompress.progress import Progress


def open_for_logits(checkpoint: Checkpoint, device, dtype) -> "StreamedLogits | WholeLogits":
    """A checkpoint that runs block by block as it does whole streamed; any other loaded whole, by transformers."""
    if is_streamed(checkpoint.quantization_config):
        return StreamedLogits(open_streamed(checkpoint, device, dtype))
    return WholeLogits(checkpoint, device, dtype)


def open_streamed(checkpoint: Checkpoint, device, dtype) -> StreamedModel:
    """A checkpoint that is dense or in a format that we read, block by block."""
    return StreamedModel(checkpoint, device, dtype, decoded(checkpoint.tensors, checkpoint.quantization_config))


def as_read(
    tokens: Tokens, checkpoint: Checkpoint, device, dtype, seed: int, progress: Progress, whole: bool = True
) -> Tokens:
    """
    Rows of text as a model takes them: of an encoder-decoder with what it says to them itself.

    Args:
        tokens (`Tokens`): rows of text.
        checkpoint (`Checkpoint`): the model as it was.
        device, dtype: where and in what the arithmetic happens.
        seed (`int`): of what is drawn.
        progress (`Progress`): is told what is going on.
        whole (`bool`, *optional*, defaults to `True`): whether the whole model may be in memory; if not, its decoder reads how the
            text goes on.
    """
    if not reads_and_writes(checkpoint.config):
        return tokens
    if not whole and hears(checkpoint.config):
        raise InvalidValueError(
            f"What {checkpoint.name} says to what it hears is said by the whole model, which a memory limit forbids; leave out "
            "--memory-limit."
        )
    if not whole:
        progress.note(
            "below a memory limit the decoder reads how the text goes on, not what the model itself says to it"
        )
        return continued(tokens, checkpoint)
    count = len(tokens.input_ids)

    def tell(row: int) -> None:
        progress.step(f"what the model itself says: row {row + 1} of {count}", amount=0)

    return answered(tokens, open_streamed(checkpoint, device, dtype), seed, tell)


@dataclass
class StreamedLogits:
    """Logits of a model of which one block is in memory at a time."""

    model: StreamedModel

    def prepare(self, batches: list[Batch], progress: Progress, label: str) -> None:
        """Take all batches through all blocks."""
        streams = self.model.embed(batches)
        self.streams = self.model.forward_blocks(
            streams, lambda i: progress.step(f"{label}: block {i + 1} of {len(self.model)}")
        )

    def head(self):
        """A context in which logits can be had."""
        return self.model.outside(head=True)

    def logits(self, head, index: int) -> Tensor:
        """Logits of batch `index`."""
        return self.model.logits(head, self.streams[index])


class WholeLogits:
    """Logits of a model that only its own quantizer can read."""

    def __init__(self, checkpoint: Checkpoint, device, dtype):
        self.blocks = block_count(checkpoint.config)
        self.loaded = whole_model(checkpoint, torch.device(device), dtype)

    def prepare(self, batches: list[Batch], progress: Progress, label: str) -> None:
        """Nothing to do beforehand."""
        progress.step(label, self.blocks)
        self.batches = batches

    def head(self):
        """A context in which logits can be had."""
        return self.loaded

    def logits(self, head, index: int) -> Tensor:
        """Logits of batch `index`."""
        batch = self.batches[index]
        return answers(head(**batch.inputs(head.config, head.device, head.dtype), use_cache=False))


def finite(logits: Tensor, checkpoint: Checkpoint) -> Tensor:
    """
    Raises:
        CheckpointError: they are not.
    """
    if not torch.isfinite(logits.sum(-1)).all() and not torch.isfinite(logits).all():
        raise CheckpointError(
            f"The logits of {checkpoint.name} are not finite in {str(logits.dtype).removeprefix('torch.')}; "
            "give --dtype float32 or bfloat16."
        )
    return logits
