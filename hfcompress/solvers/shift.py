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
The target that a weight is rounded towards, when its inputs are no longer those of the dense model.

The layers before have been rounded, so a linear receives `X` where the dense model's received `X_f`. Rounding the least
squares solution of `min ||V X - W X_f||`, `V = W + W D H^-1` with `D = (X_f - X) X^T`, lets every linear make up for
what was lost before it (Qronos, arXiv 2505.11695; GPTAQ, arXiv 2504.02692). The correction is itself an estimate from a
finite number of tokens, so how much of it is used is settled on tokens that it was not computed from.
"""

import torch
from torch import Tensor

from hfcompress.solvers.gptq import Factor


LARGEST = 0.2  # of the correction's norm over the weight's


def target_shift(weight: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """
    The correction `W D H^-1`.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32.
        cross (`Tensor`): `D`, `(X_f - X)^T X / tokens` with tokens as rows, `(in_features, in_features)`.
        factor (`Factor`): of the damped Gram matrix `H` of `X`, over the same tokens.

    Returns:
        `Tensor`: `(out_features, in_features)`.
    """
    moved = (weight @ cross)[:, factor.order]
    upper = factor.feedback  # H = U diag(importance) U^T in the order of the factor; its unit diagonal is implied
    moved = torch.linalg.solve_triangular(upper.T, moved, upper=False, left=False, unitriangular=True)
    moved /= factor.importance[factor.order]
    moved = torch.linalg.solve_triangular(upper, moved, upper=True, left=False, unitriangular=True)
    shift = torch.empty_like(moved)
    shift[:, factor.order] = moved
    return shift


def shift_strength(weight: Tensor, shift: Tensor, gram: Tensor, cross: Tensor, most: float = 1.0) -> float:
    """
    The share of a correction that helps on tokens it was not computed from: the least of
    `||(W + a S) X - W X_f||^2`, a parabola in `a`, between 0 and `most`.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32.
        shift (`Tensor`): `S`, from [`target_shift`] on other tokens.
        gram (`Tensor`): `X^T X` of the held-out tokens.
        cross (`Tensor`): `(X_f - X)^T X` of the held-out tokens.
        most (`float`, *optional*, defaults to 1.0): the largest share.
    """
    helps = ((weight @ cross) * shift).sum()
    costs = ((shift @ gram) * shift).sum()
    if not costs > 0:
        return 0.0
    return float((helps / costs).clamp(0, most))


def capped(shift: Tensor, weight: Tensor) -> Tensor:
    """The correction, no longer than a fifth of the weight: what asks for more is noise or a broken factor."""
    ratio = (shift.norm() / weight.norm().clamp_min(1e-30)).item()
    return shift * (LARGEST / ratio) if ratio > LARGEST else shift
