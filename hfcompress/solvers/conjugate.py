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
"""Conjugate gradients, for what enters an objective quadratically."""

from collections.abc import Callable

import torch
from torch import Tensor

from hfcompress.solvers.curvature import ratio


def conjugate_gradients(
    residual: Tensor,
    diagonal: Tensor,
    curved: Callable[[Tensor], Tensor],
    totals: Callable[[Tensor], Tensor],
    steps: int,
) -> Tensor:
    """
    A few steps towards the solution of `A x = b`, from zero, preconditioned by the diagonal of `A`.

    Args:
        residual (`Tensor`): `b`.
        diagonal (`Tensor`): of `A`, likewise; above zero.
        curved (`Callable`): the product of `A` with such a tensor.
        totals (`Callable`): float64 sums of such a tensor over all that depends on one another, in a shape that goes with it:
            of several systems at once each has its own steps.
        steps (`int`): how many.
    """
    found, moved = torch.zeros_like(residual), residual / diagonal
    direction, norm = moved.clone(), totals(residual * moved)
    for _ in range(steps):
        bent = curved(direction)
        length = ratio(norm, totals(direction * bent))
        if not length.any():
            break
        found += length * direction
        residual = residual - length * bent
        moved = residual / diagonal
        norm, last = totals(residual * moved), norm
        direction = moved + ratio(norm, last) * direction
    return found
