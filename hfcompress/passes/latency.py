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
"""How long a token takes in a model of other shapes, timed on one block of them, with made-up weights."""

import copy
import time
from dataclasses import dataclass

import torch
from torch import nn

from hfcompress.models.shallow import changed_config, depth_changes
from hfcompress.models.streaming import StreamedModel, build_skeleton


WARM_UP, REPEATS = 3, 20  # the fastest counts: what else the machine does only ever adds


@dataclass(frozen=True)
class Latency:
    """
    Args:
        block (`float`): seconds of one decoder block.
        outside (`float`): seconds of all that is not a block: embeddings, final norm, output head.
    """

    block: float
    outside: float

    def of(self, blocks: int) -> float:
        """Seconds of a model of so many blocks."""
        return self.outside + blocks * self.block


@torch.no_grad()
def latency(model: StreamedModel, config=None) -> Latency:
    """
    One token through a model of one block, without a cache: what decoding costs beside reading the cache.

    Args:
        model (`StreamedModel`): says where, and in which dtype; its weights are not read.
        config (*optional*): of a model of other shapes; that of `model` if `None`.
    """
    checkpoint = copy.copy(model.checkpoint)
    config = checkpoint.config if config is None else config
    checkpoint.config = changed_config(config, depth_changes(config, [0]))
    built = build_skeleton(checkpoint, model.dtype)
    for module in built.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.full(parameter.shape, 0.01, dtype=parameter.dtype, device=model.device)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
    built.to(model.device).tie_weights()
    marks: list[float] = []

    def mark(*_) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        marks.append(time.perf_counter())

    block = built.get_submodule(model.block_names[0])
    block.register_forward_pre_hook(mark)
    block.register_forward_hook(mark)
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    taken = []
    for _ in range(WARM_UP + REPEATS):
        marks.clear()
        mark()
        built(token, use_cache=False)
        mark()
        start, entered, left, end = marks
        taken.append((left - entered, end - start - (left - entered)))
    blocks, outside = zip(*taken[WARM_UP:], strict=True)
    return Latency(min(blocks), min(outside))
