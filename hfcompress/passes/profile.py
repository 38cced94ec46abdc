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
"""Where the time of a block pass goes, beside what its arithmetic has to be."""

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hfcompress.passes.plan import LinearTask


READ, FORWARD, SUMS, SOLVE, WRITE = "reading", "forwards", "sums of inputs", "solving", "writing"
GRADIENTS = "gradients"
GEMM, REPEATS = 1024, 4  # the product by which the machine's rate is measured


@dataclass
class _Part:
    seconds: float = 0.0
    operations: float = 0.0  # of floating point


@dataclass
class Profile:
    """
    Seconds and floating-point operations by part. A part that is begun within another is taken off that one.

    Args:
        parts (`dict`): part -> what it has taken so far.
    """

    parts: dict[str, _Part] = field(default_factory=dict)
    _within: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def part(self, name: str) -> Generator[None]:
        """Within, the time is that of part `name`."""
        began = time.perf_counter()
        self._within.append(name)
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._within.pop()
            self._of(name).seconds += seconds
            if self._within:
                self._of(self._within[-1]).seconds -= seconds

    def count(self, name: str, operations: float) -> None:
        """Part `name` has done so many operations."""
        self._of(name).operations += operations

    def spent(self, *names: str) -> float:
        """Seconds that these parts have taken so far."""
        return sum(self._of(name).seconds for name in names)

    def _of(self, name: str) -> _Part:
        return self.parts.setdefault(name, _Part())

    def described(self, device: torch.device) -> dict[str, Any]:
        """
        Part -> seconds, billions of operations, and seconds that these take at the machine's rate.

        Args:
            device (`torch.device`): whose rate is measured.
        """
        rate = gemm_rate(device)
        return {
            "gemm_gflops": round(rate / 1e9, 1),
            "parts": {
                name: {
                    "seconds": round(part.seconds, 3),
                    "gflop": round(part.operations / 1e9, 3),
                    "floor_seconds": round(part.operations / rate, 3),
                }
                for name, part in self.parts.items()
            },
        }


def operations_of_forwards(groups: Sequence[Sequence[int]], tokens: int, suspended: bool, last: bool) -> float:
    """
    Floating-point operations of a block's linears, attention left out.

    Args:
        groups (`list[list[int]]`): the weights of each linear, group by group in the order in which they run.
        tokens (`int`): that go through.
        suspended (`bool`): every linear runs once; otherwise the forward runs again up to every group.
        last (`bool`): nothing runs behind the last group.
    """
    before, total = 0, 0
    for group in groups:
        if not suspended:
            total += before
        before += sum(group)
    if suspended:
        total = before - (sum(groups[-1]) if last and groups else 0)
    elif not last:
        total += before
    return 2.0 * tokens * total


def operations_of_sums(in_features: int, tokens: int, dense: bool) -> float:
    """Of one Gram matrix, of which half is computed; and of the products with the dense model's inputs."""
    return tokens * in_features**2 * (3.0 if dense else 1.0)


def operations_of_solving(tasks: Sequence[LinearTask]) -> float:
    """Of one factorization and one sweep over the columns, where inputs are known; other steps take more."""
    if not tasks or not tasks[0].needs_inputs:
        return 0.0
    width = tasks[0].shape.in_features
    return width**3 / 3 + sum(float(task.shape.out_features) * width**2 for task in tasks)


def gemm_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large float32 product."""
    a = torch.randn(GEMM, GEMM, device=device)
    a @ a
    _finish(device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        a @ a
    _finish(device)
    return 2.0 * GEMM**3 * REPEATS / (time.perf_counter() - began)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
