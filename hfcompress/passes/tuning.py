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
"""After a block's weights are solved: all of them moved together until its output is nearer to the dense one."""

from collections.abc import Collection, Mapping, Sequence
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

    def for_linear(self, linear: str) -> Any:
        """The step itself, or `None` if it leaves the linear alone."""


class BlockTuner:
    """
    Args:
        model (`StreamedModel`): the model.
        index (`int`): which block.
        streams (`Sequence[Stream]`): what the solved block receives.
        outputs (`Sequence[Tensor]`): what the dense block made of the dense model's stream.
        curvature (`Tensor` or `None`): what errors of the output cost, float32 `(hidden_size, hidden_size)`; all the
            same if `None`.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        streams: Sequence[Stream],
        outputs: Sequence[Tensor],
        curvature: Tensor | None = None,
    ):
        self.model, self.index, self.streams, self.outputs = model, index, streams, outputs
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
        added = {n: _learning(linears[n], q, weights[n], n in sparse) for n, q in own.items()}
        try:
            best, loss = self._descend(block, linears, added, step, start)
        finally:
            for name, quantized in own.items():
                parametrize.remove_parametrizations(linears[name], "weight", leave_parametrized=True)
                set_weight(linears[name], quantized.dequantize())
        for name, quantized in best.items():
            set_weight(linears[name], quantized.dequantize())
        return best, {"tuned": {"held_out_error_before": start, "held_out_error": loss}}

    def _descend(
        self,
        block: nn.Module,
        linears: Mapping[str, Linear],
        added: Mapping[str, FakeQuantized | FreeWeight],
        step: Tuning,
        start: float,
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
        best, least = {}, start
        look = max(1, step.iterations // LOOKS)
        order: list[int] = []
        for iteration in range(step.iterations):
            order = order or torch.randperm(len(self.shown), generator=generator).tolist()
            number = self.shown[order.pop()]
            with torch.enable_grad():
                error = self._error(block, number)
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
                loss = self._loss(block, self.held_out)
                if loss < least:
                    least = loss
                    best = {n: each.quantized(weights[n]) for n, each in added.items()}
        return best, least

    def _error(self, block: nn.Module, number: int) -> Tensor:
        """What the output is off by, for the tokens that are no padding: `(tokens, hidden_size)`."""
        stream = self.streams[number]
        error = self.model.call(block, self.index, stream) - self.outputs[number]
        error = error.flatten(0, -2).float()
        if stream.batch.mask is not None:
            error = error[stream.batch.mask.flatten().to(error.device)]
        return error if self.root is None else error @ self.root

    def _loss(self, block: nn.Module, numbers: Sequence[int]) -> float:
        """The squared error over the rows `numbers`, as a share of the squared output."""
        lost = whole = 0.0
        for number in numbers:
            lost += self._error(block, number).square().sum().item()
            output = self.outputs[number].flatten(0, -2).float()
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
