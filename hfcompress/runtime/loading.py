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
"""`load()`: a checkpoint as an ordinary model, its weights unpacked, or left as they are stored."""

from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from hfcompress.formats.reading import decoded
from hfcompress.formats.stored import PackedTensor
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.devices import find_device, find_dtype
from hfcompress.models.streaming import StreamedModel
from hfcompress.runtime.stored_linear import StoredLinear


def load(
    model: str | Path,
    *,
    packed: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """
    A model in any format that hfcompress reads, without a plug-in or a further package.

    Args:
        model (`str` or `Path`): a folder, or a repo on the Hub.
        packed (`bool`, *optional*, defaults to `False`): keep the weights of linears in memory as they are stored and unpack
            each while it runs: for codes of 2 bits an eighth of bfloat16's memory, and slower. Such a model is for running, not
            for training or saving. Linears whose inputs are rounded, experts and blocks that lean on others are unpacked
            while they are loaded.
        device (`str`, *optional*): where.
        dtype (`str`, *optional*): of the arithmetic; by default float32 on a CPU and the checkpoint's on a GPU.
        trust_remote_code (`bool`, *optional*): run modelling code that the repo carries.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
        UnsupportedModelError: a format that hfcompress does not read, or an architecture that it cannot treat correctly.
    """
    checkpoint = Checkpoint.open(model, None, trust_remote_code)
    where = find_device(device)
    return load_checkpoint(checkpoint, where, find_dtype(dtype, where, checkpoint), packed)


def load_checkpoint(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, packed: bool = False
) -> PreTrainedModel:
    """[`load`] for a checkpoint that is open."""
    streamed = StreamedModel(checkpoint, device, dtype, decoded(checkpoint.tensors, checkpoint.quantization_config))
    model = streamed.whole(without=_left_packed(streamed) if packed else ())
    assert checkpoint.folder is not None
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model


def _left_packed(streamed: StreamedModel) -> set[str]:
    """Put linears that keep their stored weights in place of others, and name what is then not to be loaded."""
    names = set()
    for name, module in list(streamed.skeleton.named_modules()):
        source = streamed.sources.get(f"{name}.weight", "")
        stored = streamed.tensors.get(source)
        if type(module) is not nn.Linear or not isinstance(stored, PackedTensor):
            continue
        if stored.grid.activations != "none" or getattr(stored, "base", None) is not None:
            continue
        parent, _, own = name.rpartition(".")
        bias: nn.Parameter | None = module.bias
        setattr(streamed.skeleton.get_submodule(parent), own, StoredLinear(stored, bias, streamed.device))
        names.add(source)
    return names
