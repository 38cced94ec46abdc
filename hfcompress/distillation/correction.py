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
What a linear's output lacks, as a product of two narrow matrices beside it (LoRA, arXiv 2106.09685).

A correction that is to be shipped as a PEFT adapter is just that. One that is to be merged into a sparse weight may only
change what is not zero: its product is masked in the forward that it is trained in, so that merging changes nothing.
"""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Correction(nn.Module):
    """
    Args:
        down (`Tensor`): `(rank, in_features)`, what reads the input; PEFT's `lora_A`.
        up (`Tensor`): `(out_features, rank)`; PEFT's `lora_B`.
        keep (`Tensor`, *optional*): bool `(out_features, in_features)`, where the weight may change.
    """

    def __init__(self, down: Tensor, up: Tensor, keep: Tensor | None = None):
        super().__init__()
        self.down, self.up = nn.Parameter(down.float()), nn.Parameter(up.float())
        self.keep: Tensor | None
        self.register_buffer("keep", keep)

    def weight(self) -> Tensor:
        """What is added to the linear's weight: float32 `(out_features, in_features)`."""
        product = self.up @ self.down
        return product if self.keep is None else product * self.keep

    def forward(self, inputs: Tensor) -> Tensor:
        """What is added to the linear's output."""
        if self.keep is not None:
            return nn.functional.linear(inputs, self.weight().to(inputs.dtype))
        narrow = nn.functional.linear(inputs, self.down.to(inputs.dtype))
        return nn.functional.linear(narrow, self.up.to(inputs.dtype))

    def beside(self, linear: nn.Module) -> RemovableHandle:
        """Let a linear (or `Conv1D`) answer with it."""
        return linear.register_forward_hook(lambda module, args, output: output + self(args[0]))


def error_correcting(error: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """
    The product of narrow matrices that is nearest to the error of a weight where its inputs go: the least
    `||(error - up @ down) gram^(1/2)||` of its rank.

    With `U` the leading eigenvectors of `error gram error^T`, that is `U U^T error`: the truncated singular value
    decomposition of `error gram^(1/2)` (EoRA, arXiv 2410.21271, section 3), without its root and its inverse.

    Args:
        error (`Tensor`): `(out_features, in_features)`, what the weight was less what it is.
        gram (`Tensor`): `(in_features, in_features)`, the sum of `x x^T` over its inputs.
        rank (`int`): of the product.

    Returns:
        `tuple[Tensor, Tensor]`: `down` `(rank, in_features)` and `up` `(out_features, rank)`, of like sizes.
    """
    error, gram = error.double(), gram.double()
    _, vectors = torch.linalg.eigh(error @ gram @ error.T)
    up = vectors[:, -rank:].flip(1)
    down = up.T @ error
    size = down.norm(dim=1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (down / size[:, None]).float(), (up * size).float()


def starting(shape: tuple[int, int], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As LoRA begins: `down` at random (`1 / sqrt(in_features)`), `up` zero, so that nothing is added yet."""
    out_features, in_features = shape
    down = torch.randn(rank, in_features, generator=generator) * in_features**-0.5
    return down, torch.zeros(out_features, rank)
