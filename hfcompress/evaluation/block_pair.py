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
"""The same decoder block of two models, along both models' streams, and what is seen of their difference."""

import numpy as np
import torch
from torch import Tensor, nn

from hfcompress.evaluation.attention_maps import AttentionDistance, attention_maps
from hfcompress.models.streaming import Stream, StreamedModel


class BlockPair:
    """
    The same block of two models, and what has been seen of their difference.

    Args:
        baseline (`StreamedModel`), block (`nn.Module`): one model and its block.
        candidate (`StreamedModel`), other (`nn.Module`): the other.
        index (`int`): which block.
    """

    def __init__(
        self, baseline: StreamedModel, block: nn.Module, candidate: StreamedModel, other: nn.Module, index: int
    ):
        self.baseline, self.block, self.candidate, self.other, self.index = baseline, block, candidate, other, index
        self.error, self.error_alone, self.attention = RelativeError(), RelativeError(), AttentionDistance()

    def advance(self, stream: Stream, own: Stream) -> tuple[Stream, Stream, Stream]:
        """
        Args:
            stream (`Stream`): the baseline's.
            own (`Stream`): the candidate's.

        Returns:
            `tuple`: both after the block, and the baseline's after the candidate's block.
        """
        started = stream.advanced(self.candidate.call(self.other, self.index, own.advanced(stream.hidden)))
        with attention_maps(self.block, *stream.hidden.shape[:2]) as maps:
            stream = stream.advanced(self.baseline.call(self.block, self.index, stream))
        with attention_maps(self.other, *own.hidden.shape[:2]) as others:
            own = own.advanced(self.candidate.call(self.other, self.index, own))
        mask = not_padding(stream)
        self.error.add(own.hidden, stream.hidden, mask)
        self.error_alone.add(started.hidden, stream.hidden, mask)
        self.attention.add(maps, others, mask)
        return stream, own, started

    def results(self) -> dict[str, float | None]:
        """What the report says of this block alone."""
        distances = self.attention.result()
        return {
            "relative_error": self.error.result(),
            "relative_error_alone": self.error_alone.result(),
            "attention_distance": None if distances is None else float(np.mean(distances)),
        }


class RelativeError:
    """`||found - expected|| / ||expected||` (Frobenius) over everything that was added, in float64."""

    def __init__(self):
        self.difference = self.whole = 0.0

    def add(self, found: Tensor, expected: Tensor, mask: Tensor) -> None:
        """Hidden states `(rows, seq_len, hidden_size)` and where they are no padding."""
        found, expected = found[mask].double(), expected[mask].double()
        self.difference += (found - expected).square().sum().item()
        self.whole += expected.square().sum().item()

    def result(self) -> float:
        """A fraction; 0 where both vanish."""
        return (self.difference / self.whole) ** 0.5 if self.difference else 0.0


def not_padding(stream: Stream) -> Tensor:
    """Where a stream's tokens are no padding: bool `(rows, seq_len)`."""
    mask = stream.batch.mask
    if mask is None:
        mask = torch.ones(stream.batch.input_ids.shape, dtype=torch.bool)
    return mask.to(stream.hidden.device)
