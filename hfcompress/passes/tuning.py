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
"""
After a block's weights are solved: all of them moved together until its output is nearer to the dense one, or first those
of its attention by what the attention puts out, and then the others.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfcompress.distillation.fake_quantized import FakeQuantized, fake_quantize_linear
from hfcompress.distillation.free_weight import FreeWeight
from hfcompress.models.roles import Linear, linear_shape, set_weight
from hfcompress.models.streaming import Stream, StreamedModel
from hfcompress.solvers.fake_quantization import positions
from hfcompress.solvers.grid import QuantizedWeight


HELD_OUT = 8  # every eighth batch
REACH = 0.2  # of a step: how far from its code a weight starts, at most; one at its cell's edge would flip at once
LOOKS = 10  # at the held-out rows
BETAS, TINY = (0.9, 0.98), 1e-12  # of Adam
TYPES = ("int", "plain")  # of grids that weights can move on


class Tuning(Protocol):
    """What is asked of the step; a rate is in steps of the grid, or in units of what is typical in a weight's row."""

    iterations: int
    learning_rate: float
    scale_learning_rate: float
    seed: int
    halves: bool

    def for_linear(self, linear: str) -> Any:
        """The step itself, or `None` if it leaves the linear alone."""


def first_half(block: nn.Module) -> str | None:
    """The child of a block that holds its attention: the first one with linears in it; `None` if that is all of them."""
    linears = [name for name, module in block.named_modules() if isinstance(module, Linear)]
    heads = [name.partition(".")[0] for name in linears if "." in name]
    if not heads or all(name.startswith(f"{heads[0]}.") for name in linears):
        return None
    return heads[0]


@contextmanager
def watch_output(block: nn.Module, child: str | None) -> Generator[list[Tensor]]:
    """Within, every forward of the block puts what this child of it returns into the list."""
    found: list[Tensor] = []
    if child is None:
        yield found
        return
    handle = block.get_submodule(child).register_forward_hook(
        lambda module, inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield found
    finally:
        handle.remove()


class BlockTuner:
    """
    Args:
        model (`StreamedModel`): the model.
        index (`int`): which block.
        streams (`Sequence[Stream]`): what the solved block receives.
        outputs (`Sequence[Tensor]`): what the dense block made of the dense model's stream.
        curvature (`Tensor` or `None`): what errors of the output cost, float32 `(hidden_size, hidden_size)`; all the
            same if `None`.
        first (`Sequence[Tensor]`, *optional*): what [`first_half`] of the dense block returned, if that is to be tuned
            first and by this alone.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        streams: Sequence[Stream],
        outputs: Sequence[Tensor],
        curvature: Tensor | None = None,
        first: Sequence[Tensor] = (),
    ):
        self.model, self.index, self.streams, self.outputs = model, index, streams, outputs
        self.first = first
        numbers = range(len(streams))
        self.held_out = [n for n in numbers if n % HELD_OUT == HELD_OUT - 1] or list(numbers)[1:][-1:]
        self.shown = [n for n in numbers if n not in self.held_out]
        self.root = None
        if curvature is not None:
            values, vectors = torch.linalg.eigh(curvature / curvature.diagonal().mean())
            self.root = vectors * values.clamp_(min=0).sqrt()

    def tune(
        self,
        block: nn.Module,
        linears: Mapping[str, Linear],
        weights: Mapping[str, Tensor],
        solved: Mapping[str, QuantizedWeight],
        step: Tuning,
        sparse: Collection[str] = (),
    ) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
        """
        Args:
            block (`nn.Module`): the solved block; it is left with the best weights.
            linears (`Mapping[str, nn.Module]`): its linears by name.
            weights (`Mapping[str, Tensor]`): what they were before that, `(out_features, in_features)` float32.
            solved (`Mapping[str, QuantizedWeight]`): what they were solved to.
            step (`Tuning`): the settings.
            sparse (`Collection[str]`, *optional*): those whose zeros remain.

        Returns:
            `tuple[dict[str, QuantizedWeight], dict]`: the linears that moved, and what there is to report: the error of
            the output on the held-out rows at the start and in the end, as a share of the output.
        """
        own = {n: q for n, q in solved.items() if step.for_linear(n) is not None and q.grid.type in TYPES}
        if not own or not self.held_out:
            return {}, {"tuned": None}
        start = self._loss(block, self.held_out)
        loss = start
        moved: dict[str, QuantizedWeight] = {}
        for child, names in self._parts(block, list(own)):
            least = start if child is None and not moved else self._loss(block, self.held_out, child)
            added = {n: _learning(linears[n], own[n], weights[n], n in sparse) for n in names}
            try:
                best, least = self._descend(block, child, linears, added, step, least)
            finally:
                for name in names:
                    parametrize.remove_parametrizations(linears[name], "weight", leave_parametrized=True)
                    set_weight(linears[name], own[name].dequantize())
            for name, quantized in best.items():
                set_weight(linears[name], quantized.dequantize())
            moved |= best
            loss = least if child is None else self._loss(block, self.held_out)
        return moved, {"tuned": {"held_out_error_before": start, "held_out_error": loss}}

    def _parts(self, block: nn.Module, names: list[str]) -> list[tuple[str | None, list[str]]]:
        """Which linears are moved together, and the child by whose output; by the block's if it is `None`."""
        child = first_half(block) if self.first else None
        if child is None:
            return [(None, names)]
        prefix = f"{self.model.block_names[self.index]}.{child}."
        inside = [name for name in names if name.startswith(prefix)]
        halves = [(child, inside), (None, [name for name in names if name not in inside])]
        return [(each, own) for each, own in halves if own]

    def _descend(
        self,
        block: nn.Module,
        child: str | None,
        linears: Mapping[str, Linear],
        added: Mapping[str, FakeQuantized | FreeWeight],
        step: Tuning,
        least: float,
    ) -> tuple[dict[str, QuantizedWeight], float]:
        """
        Sign descent on grids, Adam where there is none (of the signs of small batches those weights never come to
        rest); the best iterate on the held-out rows, none if that is the start.
        """
        weights = {n: linears[n].get_parameter("parametrizations.weight.original") for n in added}
        free = [weight for name, weight in weights.items() if isinstance(added[name], FreeWeight)]
        moving = [(weight, step.learning_rate) for n, weight in weights.items() if isinstance(added[n], FakeQuantized)]
        moving += [
            (each.ratio, step.scale_learning_rate) for each in added.values() if isinstance(each, FakeQuantized)
        ]
        parameters = [parameter for parameter, _ in moving]
        adam = torch.optim.Adam(free, betas=BETAS, eps=TINY) if free else None
        generator = torch.Generator().manual_seed(step.seed + self.index)
        best: dict[str, QuantizedWeight] = {}
        look = max(1, step.iterations // LOOKS)
        order: list[int] = []
        for iteration in range(step.iterations):
            order = order or torch.randperm(len(self.shown), generator=generator).tolist()
            number = self.shown[order.pop()]
            with torch.enable_grad():
                error = self._error(block, number, child)
                gradients = torch.autograd.grad(error.square().mean(), [*free, *parameters])
            left = 1 - iteration / step.iterations
            for (parameter, rate), gradient in zip(moving, gradients[len(free) :], strict=True):
                parameter.data.sub_(gradient.sign(), alpha=rate * left)
            if adam is not None:
                for weight, gradient in zip(free, gradients[: len(free)], strict=True):
                    weight.grad = gradient
                adam.param_groups[0]["lr"] = step.learning_rate * left
                adam.step()
            if (iteration + 1) % look == 0 or iteration + 1 == step.iterations:
                loss = self._loss(block, self.held_out, child)
                if loss < least:
                    least = loss
                    best = {n: each.quantized(weights[n]) for n, each in added.items()}
        return best, least

    def _error(self, block: nn.Module, number: int, child: str | None) -> Tensor:
        """What the output is off by, for the tokens that are no padding: `(tokens, hidden_size)`."""
        stream = self.streams[number]
        with watch_output(block, child) as found:
            output = self.model.call(block, self.index, stream)
        error = (output if child is None else found[0]) - self._targets(child)[number]
        mask = stream.batch.mask_of(error)
        error = error.flatten(0, -2).float()
        if mask is not None:
            error = error[mask.flatten().to(error.device)]
        return error if self.root is None else error @ self.root

    def _targets(self, child: str | None) -> Sequence[Tensor]:
        return self.outputs if child is None else self.first

    def _loss(self, block: nn.Module, numbers: Sequence[int], child: str | None = None) -> float:
        """The squared error over the rows `numbers`, as a share of the squared output."""
        lost = whole = 0.0
        for number in numbers:
            lost += self._error(block, number, child).square().sum().item()
            output = self._targets(child)[number].flatten(0, -2).float()
            whole += (output if self.root is None else output @ self.root).square().sum().item()
        return lost / max(whole, 1e-30)


def _learning(linear: Linear, start: QuantizedWeight, weight: Tensor, sparse: bool) -> FakeQuantized | FreeWeight:
    """Let a linear learn from where a solver has left it."""
    dtype = linear.weight.dtype
    if start.grid.is_plain:
        free = FreeWeight(start, dtype, sparse, transposed=linear_shape("", linear).transposed)
        parametrize.register_parametrization(linear, "weight", free, unsafe=True)
        return free
    added = fake_quantize_linear(linear, start, dtype, "both", sparse)
    position = linear.get_parameter("parametrizations.weight.original")
    position.data.copy_(positions(weight, start, 0.5 - REACH))
    return added
