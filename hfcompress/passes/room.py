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
"""Whether a whole model can be trained here, before any work."""

import math
from typing import Protocol

import psutil
import torch

from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError, InvalidValueError
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.processes import Processes


TRAINED_BYTES = 16  # per weight: itself, its gradient, two moments
BLOCK_HIDDEN, BLOCK_WIDEST = 16, 4  # tensors of these widths that a block keeps for the way back, about


class Batches(Protocol):
    """What is asked of a step that trains."""

    steps: int | None
    tokens: int | None
    epochs: int
    batch_size: int
    accumulation: int
    held_out: int


def steps_of(name: str, settings: Batches, tokens: Tokens) -> int:
    """
    Optimizer steps.

    Raises:
        CalibrationError: there are too few rows.
    """
    rows = len(tokens.input_ids) - settings.held_out
    if rows < settings.batch_size:
        raise CalibrationError(
            f"{name} has {len(tokens.input_ids)} calibration rows, which is less than held_out ({settings.held_out}) "
            f"and one batch ({settings.batch_size}); give more --samples, or lower {name}.batch_size or {name}.held_out."
        )
    if settings.tokens is not None:
        return math.ceil(settings.tokens / (settings.batch_size * tokens.input_ids.shape[1]))
    return settings.steps or settings.epochs * (rows // settings.batch_size)


def memory_needed(model: StreamedModel, settings: Batches, tokens: Tokens, trained: int, widest: int) -> int:
    """
    Bytes, about: the whole model, what learns, the hidden states of a part of a batch, one hidden state per token.

    Args:
        model (`StreamedModel`): the model.
        settings (`Batches`): how it is trained.
        tokens (`Tokens`): the calibration rows.
        trained (`int`): weights that learn.
        widest (`int`): inputs of the widest linear.
    """
    config = model.skeleton.config.get_text_config()
    size = model.dtype.itemsize
    everything = sum(parameter.numel() for parameter in model.skeleton.parameters())
    per_token = (BLOCK_HIDDEN * config.hidden_size + BLOCK_WIDEST * widest) * size
    rows = settings.batch_size // settings.accumulation
    activations = rows * tokens.input_ids.shape[1] * per_token * len(model)
    teacher = tokens.input_ids.size * config.hidden_size * size
    return everything * size + trained * TRAINED_BYTES + activations + teacher


def require_room(
    name: str, needed: int, advice: str, device: torch.device, processes: Processes, memory_limit: int | None
) -> None:
    """
    Raises:
        InvalidValueError: it cannot be trained here.
    """
    if processes.count > 1:
        raise InvalidValueError(f"{name} trains in one process; start it without torchrun or accelerate launch.")
    if device.type == "cuda" and device.index:
        raise InvalidValueError(
            f"{name} trains on the first GPU; give --device cuda and choose it with CUDA_VISIBLE_DEVICES={device.index}."
        )
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
        if memory_limit is not None:
            free = min(free, memory_limit - psutil.Process().memory_info().rss)
    if needed > free:
        raise InvalidValueError(
            f"{name} trains the whole model at once and needs about {needed / 1e9:.3g} GB, but {max(free, 0) / 1e9:.3g} "
            f"GB are free; {advice}, or use a larger machine."
        )
