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
2:4 weights on the sparse tensor cores of an NVIDIA GPU, linear by linear, where that is faster here.

    from hfcompress.runtime.semi_structured import use_sparse_kernels

    report = use_sparse_kernels(model, tokens=4096)

Such kernels help where many tokens go through a linear at once, and seldom where few do: so every linear is timed both
ways on the GPU that will run it, with as many tokens as asked for, and left dense unless the sparse one wins.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfcompress.solvers.pattern import Pattern


PATTERN = Pattern.parse("2:4")
CAPABILITY = (8, 0)  # the least that has sparse tensor cores
MULTIPLE = 64  # of both sides of a weight
DTYPES = (torch.float16, torch.bfloat16)
WARM_UPS, REPEATS, INNER = 3, 5, 10
MARGIN = 0.98  # of the dense time, that the sparse one must stay below


@dataclass(frozen=True)
class Trial:
    """
    Args:
        name (`str`): the linear.
        dense_seconds (`float`): of one forward.
        sparse_seconds (`float` or `None`): likewise; `None` where torch has no kernel for the shape.
        used (`bool`): whether the sparse one was kept.
    """

    name: str
    dense_seconds: float
    sparse_seconds: float | None
    used: bool


@dataclass(frozen=True)
class SparseRun:
    """
    Args:
        linears (`int`): linears of the model whose weights are 2:4.
        trials (`list[Trial]`): those that were timed.
        reason (`str` or `None`): why none was.
    """

    linears: int
    trials: list[Trial]
    reason: str | None = None

    @property
    def used(self) -> int:
        """Linears that now run on sparse kernels."""
        return sum(trial.used for trial in self.trials)


def sparse_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears whose plain weights are 2:4, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.is_floating_point()
        and PATTERN.fits(*module.weight.shape)
        and PATTERN.holds(module.weight.detach())
    }


@torch.no_grad()
def use_sparse_kernels(
    model: nn.Module,
    tokens: int,
    convert: Callable[[Tensor], Tensor] | None = None,
    seconds: Callable[[nn.Linear, Tensor], float] | None = None,
) -> SparseRun:
    """
    Let every 2:4 linear run on sparse kernels where that is faster; the others stay as they are.

    Args:
        model (`nn.Module`): changed in place.
        tokens (`int`): that go through a linear at once.
        convert (`Callable`, *optional*): makes a sparse weight of a dense one; defaults to torch's
            `to_sparse_semi_structured`. With one given, no GPU is asked for.
        seconds (`Callable`, *optional*): times a linear on an input; defaults to the clock.
    """
    linears = sparse_linears(model)
    if convert is None:
        reason = _reason_against(linears)
        if reason is not None:
            return SparseRun(len(linears), [], reason)
        from torch.sparse import to_sparse_semi_structured

        convert = to_sparse_semi_structured
    timed = seconds or _seconds
    trials = []
    for name, linear in linears.items():
        inputs = torch.randn(tokens, linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)
        dense = linear.weight
        dense_seconds = timed(linear, inputs)
        try:
            linear.weight = nn.Parameter(convert(dense.detach()), requires_grad=False)
            sparse_seconds = timed(linear, inputs)
        except (RuntimeError, NotImplementedError, ValueError):  # no kernel for such a shape
            sparse_seconds = None
        used = sparse_seconds is not None and sparse_seconds < MARGIN * dense_seconds
        if not used:
            linear.weight = dense
        trials.append(Trial(name, dense_seconds, sparse_seconds, used))
    return SparseRun(len(linears), trials)


def _reason_against(linears: dict[str, nn.Linear]) -> str | None:
    """Why sparse kernels are of no use to these linears here."""
    if not linears:
        return "no linear has plain 2:4 weights"
    weight = next(iter(linears.values())).weight
    if weight.device.type != "cuda":
        return "torch has kernels for 2:4 weights on CUDA alone: here the zeros make nothing faster"
    if torch.cuda.get_device_capability(weight.device) < CAPABILITY:
        return "this GPU has no sparse tensor cores"
    if weight.dtype not in DTYPES:
        return (
            f"sparse kernels take float16 and bfloat16, and the weights are {str(weight.dtype).removeprefix('torch.')}"
        )
    if all(size % MULTIPLE for linear in linears.values() for size in linear.weight.shape):
        return f"sparse kernels take weights whose sides are multiples of {MULTIPLE}"
    return None


def _seconds(linear: nn.Linear, inputs: Tensor) -> float:
    """Of one forward: the median of several, after a few that are not counted."""
    for _ in range(WARM_UPS):
        linear(inputs)
    taken = []
    for _ in range(REPEATS):
        _wait(inputs)
        started = time.perf_counter()
        for _ in range(INNER):
            linear(inputs)
        _wait(inputs)
        taken.append((time.perf_counter() - started) / INNER)
    return statistics.median(taken)


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
