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
"""What each unit costs when it alone is changed, measured on a few rows while the dense model is walked.

The second-order prediction takes the errors of different tokens as independent. Those of the first blocks are not: the
same token brings the same error wherever it stands, and it reaches many predictions. So short streams, each with one
unit changed on its way, are carried to the logits beside the dense one.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.models.batch import Batch
from hfcompress.models.streaming import Stream, StreamedModel
from hfcompress.passes.processes import Processes


Swap = tuple[str, str]  # a unit's first linear, and the choice that it has been changed to


class Swaps:
    """
    Args:
        model (`StreamedModel`): the dense model.
        batches (`list[Batch]`): this process's share of a few rows.
    """

    def __init__(self, model: StreamedModel, batches: list[Batch]):
        self.model = model
        self.dense: list[Stream] = model.embed(batches) if batches else []
        self.changed: dict[Swap, list[Stream]] = {}
        self.kl: dict[Swap, float] = {}
        self._expected: list[Tensor] = []

    def advance(self, block: nn.Module, index: int) -> None:
        """Take all that was changed before through the dense block `index`."""
        self.changed = {swap: self._through(block, index, streams) for swap, streams in self.changed.items()}

    def enter(self, swap: Swap, block: nn.Module, index: int) -> None:
        """Block `index` now has one unit changed."""
        self.changed[swap] = self._through(block, index, self.dense)

    def leave(self, block: nn.Module, index: int) -> None:
        """The dense stream goes through the dense block `index`."""
        self.dense = self._through(block, index, self.dense)

    def finish(self, whole: PreTrainedModel) -> None:
        """
        Args:
            whole (`PreTrainedModel`): from [`StreamedModel.outside`] with its head.
        """
        self._expected = [self._log_probs(whole, stream) for stream in self.dense]
        for swap in list(self.changed):
            self.kl[swap] = self._divergence(whole, self.changed.pop(swap))

    def enter_head(self, swap: Swap, whole: PreTrainedModel) -> None:
        """After [`Swaps.finish`]: the head itself has been changed."""
        self.kl[swap] = self._divergence(whole, self.dense)

    def measured(self, processes: Processes) -> dict[Swap, float]:
        """Mean KL to the dense model in nats, over the predicted positions of all processes."""
        count = torch.tensor(float(sum(len(expected) for expected in self._expected)), device=self.model.device)
        total = max(processes.sum(count).item(), 1)
        sums = torch.tensor(list(self.kl.values()), dtype=torch.float64, device=self.model.device)
        return dict(zip(self.kl, (processes.sum(sums) / total).tolist(), strict=True))

    def _through(self, block: nn.Module, index: int, streams: Sequence[Stream]) -> list[Stream]:
        return [stream.advanced(self.model.call(block, index, stream)) for stream in streams]

    def _divergence(self, whole: PreTrainedModel, streams: Sequence[Stream]) -> float:
        total = 0.0
        for stream, expected in zip(streams, self._expected, strict=True):
            total += (expected.exp() * (expected - self._log_probs(whole, stream))).sum().item()
        return total

    def _log_probs(self, whole: PreTrainedModel, stream: Stream) -> Tensor:
        """float32 `(positions, vocabulary)`: where another token follows."""
        logits = self.model.logits(whole, stream)
        mask, logits = stream.batch.mask_of(logits), logits[:, :-1]
        kept = logits.flatten(0, 1) if mask is None else logits[mask[:, 1:].to(logits.device)]
        return torch.log_softmax(kept.float(), -1)


def corrected(predicted: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """
    Bring predictions in line with what was measured of some of them: the ratio of the two is interpolated between the
    choices that were measured, all in logarithms, and kept beyond them.

    Args:
        predicted (`Mapping[str, float]`): choice -> nats.
        measured (`Mapping[str, float]`): choice -> nats, for some of them.
    """
    usable = {choice: kl for choice, kl in measured.items() if kl > 0 and predicted[choice] > 0}
    known = sorted((math.log(predicted[choice]), math.log(kl / predicted[choice])) for choice, kl in usable.items())
    if not known:
        return dict(predicted)
    places, ratios = zip(*known, strict=True)
    return {
        choice: loss * math.exp(float(np.interp(math.log(loss), places, ratios))) if loss > 0 else loss
        for choice, loss in predicted.items()
    }
