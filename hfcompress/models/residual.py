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
"""Who writes the residual stream and who reads it, and which values become whose inputs: seen on the running block.

A pre-norm block only ever adds outputs of linears to the residual stream and looks at it only through RMS norms that
linears read. Every tensor that a linear or a norm receives or returns is noted in a forward of a few tokens. What a
norm sees beyond what the last one saw must then be a combination of outputs of linears (the writers), and what a
linear reads is known by its values. For the heads, single tokens are sent: one token attends to itself alone, so the
input of the output projection is a copy of its values, and comparing the two tells which row becomes which column.
Nothing is known by name.
"""

import copy
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from hfcompress.models.roles import Linear


SHARE = 1e-3  # a writer's least weight in what was added
FIT = 1e-3  # what may be left of what was added, as a share of it; RESIDUE is the rounding of the stream itself
RESIDUE = 1e-5
EQUAL = 1e-4


class UnknownRoleError(Exception):
    """A part of the model is no plain pre-norm block; the message is a clause that says which part and why."""


@dataclass(frozen=True)
class Norm:
    """
    An RMS norm that multiplies by `offset + slope * weight`.

    Args:
        parameter (`str`): full name of its weight.
        offset (`float`): 0 for most norms, 1 where the weight is the distance from one.
        slope (`float`): 1.
    """

    parameter: str
    offset: float
    slope: float


@dataclass
class Residual:
    """
    Args:
        readers (`dict[str, Norm]`): linear -> the norm whose output it reads.
        writers (`set[str]`): linears whose outputs are added to the stream.
    """

    readers: dict[str, Norm] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)

    @property
    def norms(self) -> set[Norm]:
        """The norms that look at the stream."""
        return set(self.readers.values())


@dataclass(frozen=True)
class Heads:
    """
    A linear whose rows are the values of attention, and the linear whose columns receive their averages.

    Args:
        values (`str`): the former.
        rows (`tuple[int, ...]`): the first row of each of its heads.
        output (`str`): the latter.
        columns (`tuple[int, ...]`): the first column of each of its heads.
    """

    values: str
    rows: tuple[int, ...]
    output: str
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Event:
    """A module that has run: full name, module, input and output of `(tokens, width)`."""

    name: str
    module: nn.Module
    inputs: Tensor
    outputs: Tensor


class Recording:
    """
    What the linears and the norms under a module receive and return while it runs.

    Args:
        module (`nn.Module`): what is watched.
        prefix (`str`): its full name.
        width (`int`): of the residual stream.
        skip (`str`, *optional*): names that start so are left out.
    """

    def __init__(self, module: nn.Module, prefix: str, width: int, skip: str | None = None):
        self.events: list[Event] = []
        named = ((".".join(filter(None, (prefix, name))), child) for name, child in module.named_modules())
        self._watched = {
            name: child
            for name, child in named
            if (skip is None or not name.startswith(skip))
            and (isinstance(child, Linear) or _may_be_norm(child, width))
        }

    def __enter__(self) -> Self:
        self._handles = [m.register_forward_hook(self._hook(name)) for name, m in self._watched.items()]
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):
        def hook(module, args, output):
            if args:
                inputs = args[0].detach()
                flat = (t.reshape(-1, t.shape[-1]).clone() for t in (inputs, output.detach()))
                self.events.append(Event(name, module, *flat))

        return hook


def _may_be_norm(module: nn.Module, width: int) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not list(module.children()) and all(p.shape == (width,) for p in parameters)


def residual_of_block(events: list[Event], before: Tensor, after: Tensor) -> Residual:
    """
    Args:
        events (`list[Event]`): of a forward of the block.
        before (`Tensor`): its input `(tokens, hidden_size)`.
        after (`Tensor`): its output.

    Raises:
        UnknownRoleError: it is no pre-norm block with RMS norms.
    """
    found, points, pending = Residual(), [before], []
    for event in events:
        if isinstance(event.module, Linear):
            if event.outputs.shape == before.shape:
                pending.append(event)
            continue
        if not any(_same(event.inputs, point) for point in points):
            added = _added(event.inputs - points[-1], points[-1], pending)
            if added is None:
                continue  # it looks at something else than the stream
            found.writers |= added
            pending = [e for e in pending if e.name not in added]
            points.append(event.inputs)
        found.readers |= readers_of(event, events)
    added = _added(after - points[-1], points[-1], pending)
    if added is None:
        raise UnknownRoleError("what a block adds to its residual stream is no linear's output (a norm comes between)")
    found.writers |= added
    if not found.readers or not found.writers:
        raise UnknownRoleError("no linear reads its residual stream through a norm")
    return found


def readers_of(norm: Event, events: list[Event]) -> dict[str, Norm]:
    """
    The linears that read what a norm returns.

    Raises:
        UnknownRoleError: there are none, or it is no RMS norm.
    """
    gain = gain_of(norm.module)
    if gain is None:
        raise UnknownRoleError(f"{norm.name} is no RMS norm")
    [(local, _)] = norm.module.named_parameters()
    linears = [e.name for e in events if isinstance(e.module, Linear) and _same(e.inputs, norm.outputs)]
    if not linears:
        raise UnknownRoleError(f"what {norm.name} returns is read by no linear")
    return dict.fromkeys(linears, Norm(f"{norm.name}.{local}", *gain))


@torch.no_grad()
def gain_of(module: nn.Module) -> tuple[float, float] | None:
    """
    Whether a module is an RMS norm, and what it multiplies by: tried on random inputs and weights.

    Returns:
        `tuple[float, float]` or `None`: `offset` and `slope`, if it returns `(offset + slope * weight) x / rms(x)`.
    """
    if len(list(module.parameters())) != 1:
        return None
    module = copy.deepcopy(module)
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, len(weight), generator=generator) + 1).to(weight)  # a mean, which a LayerNorm takes away
    unit = x * x.square().mean(-1, keepdim=True).rsqrt()

    def factor(value: Tensor) -> Tensor:
        weight.copy_(value)
        return module(x) / unit

    offset = factor(torch.zeros_like(weight)).mean().round().item()
    slope = factor(torch.ones_like(weight)).mean().round().item() - offset
    tried = torch.randn(len(weight), generator=generator).to(weight)
    expected = (offset + slope * tried) * unit
    weight.copy_(tried)
    return (offset, slope) if slope and torch.allclose(module(x), expected, rtol=1e-3, atol=1e-3) else None


def heads_of_block(events: list[Event], head_dim: int) -> Heads | None:
    """
    Args:
        events (`list[Event]`): of a forward of several rows of one token.
        head_dim (`int`): width of a head's values.

    Returns:
        `Heads` or `None`: `None` where no linear's inputs are copies of another's outputs, head by head.
    """
    linears = [event for event in events if isinstance(event.module, Linear)]
    for number, output in enumerate(linears):
        for values in linears[:number]:
            origin = _copied_from(output.inputs, values.outputs)
            if origin is None or len(origin) % head_dim:
                continue
            origin = origin.reshape(-1, head_dim)
            if not torch.equal(origin, origin[:, :1] + torch.arange(head_dim, device=origin.device)):
                continue
            columns = tuple(range(0, origin.numel(), head_dim))
            return Heads(values.name, tuple(origin[:, 0].unique().tolist()), output.name, columns)
    return None


def _copied_from(copies: Tensor, originals: Tensor) -> Tensor | None:
    """For each column of `copies` the equal column of `originals`; `None` if one has none."""
    weights = torch.linspace(1, 2, len(copies), dtype=torch.float64, device=copies.device)
    wanted, offered = weights @ copies.double(), weights @ originals.double()
    order = offered.argsort()
    place = torch.searchsorted(offered[order], wanted)
    below, above = (order[(place + shift).clamp(0, len(order) - 1)] for shift in (-1, 0))
    distance = torch.stack([(originals[:, n] - copies).abs().amax(0) for n in (below, above)])
    scale = copies.abs().amax().clamp(min=1e-30)
    if distance.amin(0).max() > EQUAL * scale:
        return None
    return torch.where(distance[0] < distance[1], below, above)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _added(difference: Tensor, stream: Tensor, linears: list[Event]) -> set[str] | None:
    """The linears whose outputs, each times a number, make up `difference`; `None` if they do not."""
    target = difference.double().flatten()
    allowed = FIT * target.norm() + RESIDUE * stream.double().norm()
    left, names = target, set()
    if linears:
        outputs = torch.stack([e.outputs.double().flatten() for e in linears])
        shares = torch.linalg.lstsq(outputs.T.cpu(), target[:, None].cpu()).solution[:, 0].to(target)
        left = target - shares @ outputs
        names = {e.name for e, share in zip(linears, shares.tolist(), strict=True) if abs(share) > SHARE}
    return names if left.norm() <= allowed else None
