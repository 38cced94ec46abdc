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
"""What is in a block, discovered on the running block: its linears, and which of them read the same tensor."""

import contextlib
from collections.abc import Callable, Collection, Generator, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.experts import ExpertLinear, Routed
from hfcompress.models.streaming import Stream, StreamedModel


Linear = nn.Linear | Conv1D


@dataclass(frozen=True)
class LinearShape:
    """
    Args:
        name (`str`): full module name.
        in_features (`int`): width of its input.
        out_features (`int`): width of its output.
        transposed (`bool`): a `Conv1D`, whose weight is `(in_features, out_features)`.
    """

    name: str
    in_features: int
    out_features: int
    transposed: bool


def find_linears(module: nn.Module, prefix: str) -> dict[str, Linear]:
    """Full name -> module, for every `nn.Linear` and `Conv1D` under `module`, in definition order."""
    return {f"{prefix}.{n}": m for n, m in module.named_modules() if isinstance(m, Linear)}


def linear_shape(name: str, module: Linear) -> LinearShape:
    """The shape of a linear; no weights are needed."""
    transposed = isinstance(module, Conv1D)
    rows, columns = module.weight.shape
    return LinearShape(name, *((rows, columns) if transposed else (columns, rows)), transposed)


def linear_of(model: nn.Module, name: str) -> Linear:
    """The linear called `name` in a model."""
    module = model.get_submodule(name)
    assert isinstance(module, Linear)
    return module


def get_weight(module: Linear) -> Tensor:
    """The weight of a linear as `(out_features, in_features)` float32; a copy."""
    weight = module.weight.detach().to(torch.float32, copy=True)
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def set_weight(module: Linear, weight: Tensor) -> None:
    """Put `(out_features, in_features)` values in place of the weight of a linear."""
    module.weight.data.copy_(weight.T if isinstance(module, Conv1D) else weight)


@contextlib.contextmanager
def watch_inputs(linears: Mapping[str, nn.Module], seen: Callable[[str, Any], None]) -> Generator[None]:
    """
    Call `seen(name, input)` before each of the linears runs. Of a module with several inputs, such as a cache with its
    keys and values, it is told the tuple; of a linear of an expert a [`Routed`].
    """

    def hook_for(name):
        def hook(module, args):
            tensors = tuple(a for a in args if isinstance(a, Tensor))
            given = tensors if len(tensors) > 1 else tensors[0]
            seen(name, Routed(*args) if isinstance(module, ExpertLinear) else given)
            # returns None: a value would replace the input

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def shared_inputs(
    model: StreamedModel,
    block: nn.Module,
    index: int,
    probe: Stream,
    names: Collection[str] | None = None,
    kinds: Mapping[str, Hashable] | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> list[list[str]]:
    """
    The linears of a block in groups that read the same tensor, in the order in which they run.

    Two linears share an input if the very same memory reaches both, seen on a forward of a few tokens.

    Args:
        model (`StreamedModel`): the model.
        block (`nn.Module`): its block `index`, with weights.
        index (`int`): which block.
        probe (`Stream`): a few tokens, from [`StreamedModel.probe`].
        names (`Collection[str]`, *optional*): the linears that matter; all of them if left out.
        kinds (`Mapping[str, Hashable]`, *optional*): what else must be equal for linears to be in one group.
        others (`Mapping[str, nn.Module]`, *optional*): other modules to watch; each is a group of its own.

    Returns:
        `list[list[str]]`: full names. A module that did not run is in no group.

    Raises:
        UnsupportedModelError: a linear runs more than once in a forward.
    """
    linears = find_linears(block, model.block_names[index])
    linears = {n: module for n, module in linears.items() if names is None or n in names}
    groups: dict[tuple, list[str]] = {}
    alive = []  # so that no memory is used twice while addresses are compared

    def seen(name: str, inputs: Tensor | tuple[Tensor, ...] | Routed) -> None:
        tensor = inputs[0] if isinstance(inputs, tuple) else inputs.inputs if isinstance(inputs, Routed) else inputs
        alive.append(inputs)
        if any(name in group for group in groups.values()):
            raise UnsupportedModelError(
                f"{name} runs more than once in a forward of its block; leave it alone: --set STEP.ignore=[{name}]."
            )
        kind = kinds.get(name) if kinds else None
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, kind)
        groups.setdefault(key, []).append(name)

    with watch_inputs({**linears, **(others or {})}, seen):
        model.call(block, index, probe)
    return list(groups.values())
