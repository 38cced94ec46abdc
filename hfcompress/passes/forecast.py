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
"""What a plan will take on disk, to the byte, before any of it is done: from the shapes of what the format writes."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from hfcompress.formats.writer import merged_bytes
from hfcompress.models.checkpoint import StoredTensor
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.plan import LinearTask, Plan


Stored = Tensor | StoredTensor


class Forecast:
    """
    Args:
        model (`StreamedModel`): the model.
        layout: the format that will hold the result.
    """

    def __init__(self, model: StreamedModel, layout):
        self.model, self.layout = model, layout
        self.experts = layout.storage(model.experts)
        self._packed: dict[tuple, dict[str, Tensor]] = {}

    def linear_bytes(self, task: LinearTask) -> int:
        """All tensors of one linear."""
        return sum(tensor.nbytes for tensor in self._tensors(task).values())

    def bits_per_weight(self, tasks: Iterable[LinearTask]) -> float:
        """Eight times the bytes of all tensors of the linears, over the number of their weights."""
        tasks = list(tasks)
        weights = sum(task.shape.out_features * task.shape.in_features for task in tasks)
        return 8 * sum(map(self.linear_bytes, tasks)) / weights

    def output_bytes(self, plan: Plan) -> int:
        """The sum of `model*.safetensors`, headers included."""
        return merged_bytes(self._parts(plan))

    def _parts(self, plan: Plan) -> Iterator[Mapping[str, Stored]]:
        """What the block pass writes, in the order in which it is merged."""
        stored = self.model.tensors
        for index, tasks in enumerate(plan.blocks):
            replaced = {f"{task.stem}.weight" for task in tasks.values()}
            kept = {key: stored[key] for key in self.model.keys_of_block(index) if key not in replaced}
            if self.experts.together:
                kept = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in kept.items()}
            yield self.experts.join({**self._named(tasks.values()), **kept})
        outside = [task for task in (plan.embeddings, plan.head) if task is not None]
        yield from (self._named([task]) for task in outside)
        replaced = {f"{task.stem}.weight" for task in outside}
        for key in self.model.outside_keys:
            if key not in replaced:
                yield self._beside(key, stored[key])

    def _named(self, tasks: Iterable[LinearTask]) -> dict[str, Tensor]:
        return {f"{task.stem}.{local}": t for task in tasks for local, t in self._tensors(task).items()}

    def _beside(self, key: str, tensor: StoredTensor) -> Mapping[str, Stored]:
        """What is written of a tensor that is left alone."""
        return self.layout.beside(key, tensor.read()) if self.layout.codes_beside else {key: tensor}

    def _tensors(self, task: LinearTask) -> dict[str, Tensor]:
        """What the format makes of a weight without values, by local names."""
        shape = task.shape
        key = (shape.out_features, shape.in_features, task.grid, task.scale_dtype, shape.transposed)
        if key not in self._packed:
            packed = self.layout.of(task.grid).expected(shape, task.grid, task.scale_dtype)
            if shape.transposed:
                packed["weight"] = packed["weight"].T
            self._packed[key] = packed
        return self._packed[key]
