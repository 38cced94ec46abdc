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

import logging
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from hfcompress.formats.dense_view import dense_view
from hfcompress.formats.reading import decoded, is_streamed
from hfcompress.formats.stored import PackedTensor
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.devices import find_device, find_dtype
from hfcompress.models.experts import ExpertLinear, find_experts, put_together
from hfcompress.models.streaming import StreamedModel
from hfcompress.runtime.integer_linear import DTYPE, kind_of
from hfcompress.runtime.stored_linear import PackedLinear, StoredLinear


log = logging.getLogger("hfcompress")


def load(
    model: str | Path,
    *,
    packed: bool | None = None,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """
    A model in any format that hfcompress reads, without a plug-in or a further package, as plain transformers' own class. What
    torch can multiply as it is stored stays so: on a CPU codes of up to 4 bits with groups of 32 or more, and of 8 bits with a
    scale for a row, whose inputs may be rounded to 8 bits by a scale for a token. Such a model can be saved again, as it was stored, if all its weights stayed packed. It is for running, not
    for training.

    Args:
        model (`str` or `Path`): a folder, or a repo on the Hub.
        packed (`bool`, *optional*): which weights stay packed: those that torch has kernels for if left out; with `False`
            none; with `True` all linears', those without a kernel being unpacked for as long as they run, which takes little memory
            and much time. Linears whose inputs are rounded otherwise and blocks that lean on others are unpacked while
            they are loaded.
        device (`str`, *optional*): where.
        dtype (`str`, *optional*): of the arithmetic; by default bfloat16 on a CPU where weights stay packed for torch's
            kernels, which are made for it, otherwise float32, and the checkpoint's on a GPU.
        trust_remote_code (`bool`, *optional*): run modelling code that the repo carries.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
        UnsupportedModelError: a format that hfcompress does not read, or an architecture that it cannot treat correctly.
    """
    checkpoint = Checkpoint.open(model, None, trust_remote_code, dense_view)
    where = find_device(device)
    return load_checkpoint(checkpoint, where, None if dtype is None else find_dtype(dtype, where, checkpoint), packed)


def runs_packed(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether [`load`] would leave weights as they are stored."""
    if checkpoint.folder is None or not is_streamed(checkpoint.quantization_config):
        return False
    tensors = decoded(checkpoint.tensors, checkpoint.quantization_config)
    weights = (tensor for tensor in tensors.values() if isinstance(tensor, PackedTensor))
    return any(kind_of(each, device, DTYPE) for each in weights)


def load_checkpoint(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None = None, packed: bool | None = None
) -> PreTrainedModel:
    """[`load`] for a checkpoint that is open."""
    tensors = decoded(checkpoint.tensors, checkpoint.quantization_config)
    weights = [tensor for tensor in tensors.values() if isinstance(tensor, PackedTensor)]
    if dtype is None:
        fast = packed is not False and runs_packed(checkpoint, device)
        dtype = DTYPE if fast else find_dtype(None, device, checkpoint)
    streamed = StreamedModel(checkpoint, device, dtype, tensors)
    left = set() if packed is False else _left_packed(streamed, every=packed is True)
    model = streamed.whole(without=left)
    packed_experts = any(
        isinstance(each, PackedLinear) for holder in find_experts(model).values() for each in holder.modules()
    )
    if not packed_experts:
        put_together(model, streamed.experts)
    if left:
        _tell(model, len(weights) - len(left), len(weights))
        if len(left) == len(weights) and not (packed_experts and streamed.experts.together):
            model.config.quantization_config = checkpoint.quantization_config
        else:
            for module in model.modules():
                if isinstance(module, PackedLinear):
                    module.savable = False
    assert checkpoint.folder is not None
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model


def _left_packed(streamed: StreamedModel, every: bool) -> set[str]:
    """
    Put linears that keep their stored weights in place of others, and name what is then not to be loaded.

    Args:
        streamed (`StreamedModel`): the model, without weights.
        every (`bool`): those too that are unpacked while they run.
    """
    names = set()
    for name, module in list(streamed.skeleton.named_modules()):
        source = streamed.sources.get(f"{name}.weight", "")
        stored = streamed.tensors.get(source)
        if type(module) not in (nn.Linear, ExpertLinear) or not isinstance(stored, PackedTensor):
            continue
        if getattr(stored, "base", None) is not None:
            continue
        kind = kind_of(stored, streamed.device, streamed.dtype)
        if kind is None and (stored.grid.activations != "none" or not every):
            continue
        parent, _, own = name.rpartition(".")
        bias: nn.Parameter | None = module.bias
        if kind is None:
            packed: PackedLinear = StoredLinear(stored, bias, streamed.device)
        else:
            packed = kind(stored.quantized(), stored.layout, bias)
        setattr(streamed.skeleton.get_submodule(parent), own, packed)
        names.add(source)
    return names


def _tell(model: nn.Module, unpacked: int, weights: int) -> None:
    """Say which of the packed weights do not run as they are stored."""
    slow = sum(isinstance(module, StoredLinear) for module in model.modules())
    if slow:
        log.warning(
            f"{slow} of {weights} packed weights are unpacked each time they run: torch has no kernel for them here."
        )
    if unpacked:
        log.warning(
            f"{unpacked} of {weights} packed weights were unpacked while they were loaded: torch has no kernel for them here."
        )
