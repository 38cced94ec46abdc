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
"""What zeroing a weight is taken to cost, by criteria that change no other weight."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


RIA_POWER = 0.5  # of the input's norm


def saliency(
    method: str, weight: Tensor, gram: Tensor | None, curvature: Sequence[Tensor] | None = None, seed: str = ""
) -> Tensor:
    """
    Args:
        method (`str`): `"magnitude"`: `|w|`. `"random"`: nothing. `"wanda"`: `|w| ||x_j||` (arXiv 2306.11695). `"ria"`:
            `(|w| / sum of its column + |w| / sum of its row) ||x_j||^1/2` (Zhang et al., ICLR 2024). `"taylor"`:
            `E[(w dL/dw)^2]` (Molchanov et al., arXiv 1906.10771), inputs and gradients of the outputs taken as
            independent: `w^2 C_ii H_jj`.
        weight (`Tensor`): `(out_features, in_features)` float32.
        gram (`Tensor` or `None`): `H = X^T X / tokens`, `(in_features, in_features)`, where inputs count.
        curvature (`Sequence[Tensor]`, *optional*): for `"taylor"`, `C = E[g g^T]` block by block along its diagonal.
        seed (`str`, *optional*): for `"random"`.

    Returns:
        `Tensor`: `(out_features, in_features)`.
    """
    size = weight.abs()
    if method == "magnitude":
        return size
    if method == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
    assert gram is not None
    inputs = gram.diagonal().sqrt()
    if method == "wanda":
        return size * inputs
    if method == "ria":
        share = size / size.sum(0).clamp(min=1e-30) + size / size.sum(1, keepdim=True).clamp(min=1e-30)
        return share * inputs**RIA_POWER
    assert curvature is not None
    worth = torch.cat([block.diagonal() for block in curvature]).to(weight.device)
    return size.square() * worth[:, None] * gram.diagonal()
