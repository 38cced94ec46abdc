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
"""How a model calls its blocks, noted by what stands in for them in one forward."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.encoder_decoder import TailWatch, without_states


def first_of(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return output[0] if isinstance(output, tuple) else output


class Stop(Exception):
    """Ends a forward that has done what it was run for."""


@dataclass(frozen=True)
class Returns:
    """
    Args:
        count (`int`): how many values a block returns in a tuple; 0 where it returns one by itself.
        with_others (`bool`): whether there are tensors among those behind the hidden states, which other blocks may be called
            with.
    """

    count: int
    with_others: bool

    @classmethod
    def of(cls, output: Any) -> "Returns":
        """What is seen on an output."""
        if not isinstance(output, tuple):
            return cls(0, False)
        return cls(len(output), any(isinstance(value, Tensor) for value in output[1:]))


class Recorder:
    """
    What the stubs of one forward note, and what the last of them hands back.

    Args:
        blocks (`int`): all of them.
        encoder_blocks (`int`): those of an encoder.
        returns (`list[Returns]` or `None`): what the blocks of an encoder and of a decoder, or all, return; `None` where that is
            to be found, for which the first of each are run; where none is known, a tensor by itself.
        final (`Tensor`, *optional*): what the last one hands back; without it the forward ends there.
    """

    def __init__(self, blocks: int, encoder_blocks: int, returns: list[Returns] | None, final: Tensor | None = None):
        self.blocks, self.encoder_blocks, self.final = blocks, encoder_blocks, final
        self.learns, self.returns = returns is None, returns or ([] if returns is None else [Returns(0, False)] * 2)
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        self.firsts: list[Tensor] = []
        self.others: tuple = ()
        self.seen: list[Tensor] = []  # what the encoder returned
        self.watch: TailWatch | None = None

    @property
    def states(self) -> Tensor:
        """What the encoder returned."""
        return self.seen[0]

    def receive(self, original: nn.Module, index: int, hidden: Any, args: tuple, kwargs: dict[str, Any]):
        tower = int(bool(self.encoder_blocks) and index >= self.encoder_blocks)
        leads = index == (self.encoder_blocks if tower else 0)
        if leads:
            self.firsts.append(hidden)
        if not isinstance(hidden, Tensor) or hidden is not self.firsts[tower] or index != len(self.calls):
            raise UnsupportedModelError(
                "This architecture changes the hidden states between its decoder blocks, or calls them out of order; "
                "it is not supported yet."
            )
        call = (args, kwargs)
        self.calls.append(without_states(call, self.states) if tower else call)
        if leads and (self.learns or (self.final is None and self.returns[tower].with_others)):
            output = original(hidden, *args, **kwargs)
            if self.learns:
                self.returns.append(Returns.of(output))
            self.others = output[1:] if isinstance(output, tuple) else ()
        elif leads:
            self.others = (None,) * (self.returns[tower].count - 1)
        output = hidden
        if index == self.blocks - 1:
            if self.final is None:
                raise Stop
            output = self.final
        if self.watch is not None and index == self.encoder_blocks - 1:
            self.watch.at = output
        return (output, *self.others) if self.returns[tower].count else output


class Stub(nn.Module):
    """Stands in for a block; what the model asks of the block besides its forward is answered by the block."""

    def __init__(self, original: nn.Module, index: int, recorder: Recorder):
        super().__init__()
        self.__dict__["original"], self.index, self.recorder = original, index, recorder

    def __getattr__(self, name: str):
        return getattr(self.__dict__["original"], name)

    def forward(self, *args, **kwargs):
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states", None)
        return self.recorder.receive(self.__dict__["original"], self.index, hidden, args, kwargs)


def shared_where_equal(calls, others):
    """`calls` with every tensor that equals its counterpart in `others` replaced by it: one copy in memory."""
    memo: dict[int, Any] = {}

    def shared(value, other):
        if id(value) in memo:
            return memo[id(value)]
        result = value
        if isinstance(value, Tensor):
            same = isinstance(other, Tensor) and value.shape == other.shape and value.dtype == other.dtype
            result = other if same and torch.equal(value, other) else value
        elif isinstance(value, (tuple, list)) and isinstance(other, type(value)) and len(value) == len(other):
            result = type(value)(shared(v, o) for v, o in zip(value, other, strict=True))
        elif isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
            result = {k: shared(v, other[k]) for k, v in value.items()}
        memo[id(value)] = result
        return result

    return [(shared(a, oa), shared(k, ok)) for (a, k), (oa, ok) in zip(calls, others, strict=True)]
