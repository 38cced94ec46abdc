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
"""Weights at levels that every row has of its own."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.coded import Coded


@dataclass(frozen=True, kw_only=True)
class Codebook(Coded):
    """
    GPTQ on levels that lie where a row's weights want them, instead of evenly (non-uniform quantization). Behind `sparsify`
    one level of each row is zero. The codes are entropy-coded where that takes fewer bytes. For one codebook for a whole
    weight there is [`VQ`] with `length` 1.

    Args:
        bits (`int`, *optional*, defaults to 3): bits per code: 1, 2, 3 or 4, for as many levels as they tell apart.
        group_size (`int`, *optional*, defaults to -1): weights of a row that share levels, -1 for the whole row. Levels take 16
            bits each, so that groups pay with very few of them at most.
        start (`str`, *optional*, defaults to `"k-means"`): the levels that are begun with: `"k-means"` for those of least
            weighted squared error, `"mixture"` for the means of a mixture of Gaussians, which lost more wherever it was measured.
        damping (`float`, *optional*, defaults to 0.03): added to the diagonal of the Gram matrix, as a share of its
            mean.
        shift (`float`, *optional*, defaults to 1.0): how much each linear may make up for what was lost before it, as in
            [`GPTQ`].
        curvature (`bool`, *optional*, defaults to `True`): weigh errors by what each output is worth to the model's
            predictions, found by backward passes through the dense model.
        rounds (`int`, *optional*, defaults to 3): times that levels and codes are improved in turn.
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
        overrides (`Mapping[str, Mapping]`, *optional*): see [`Recipe`].
    """

    name: ClassVar[str] = "codebook"
    needs_inputs: ClassVar[bool] = True
    looks_up: ClassVar[bool] = True
    type: ClassVar[str] = "codebook"
    trainable: ClassVar[bool] = True

    bits: Literal[1, 2, 3, 4] = 3
    group_size: Literal[-1, 16, 32, 64, 128, 256] = -1
    start: Literal["k-means", "mixture"] = "k-means"
    damping: float = 0.03
    shift: float = 1.0
    curvature: bool = True
    rounds: int = 3

    def __post_init__(self):
        super().__post_init__()
        self._check_shares("damping", "shift")
        if self.rounds < 0:
            raise InvalidValueError(f"codebook.rounds is {self.rounds}; it must not be negative.")

    @property
    def needs_curvature(self) -> bool:
        """Whether the outputs' worth to the predictions is asked for."""
        return self.curvature

    def quantize(self, weight, statistics, grid, scale_dtype, linears, curvature=None, keep=None):
        """See `passes.plan.Quantizer`."""
        from hfcompress.solvers.codebook import gptq_codebook
        from hfcompress.solvers.curvature import factorize_rows
        from hfcompress.solvers.grid import QuantizedWeight

        factor = statistics.factor(self.damping, True, linears)
        target, share = statistics.target(weight, self.damping, True, linears, self.shift)

        def solve(part: slice, blocks: slice):
            own = (weight[part], target[part], statistics.gram, factor)
            stays = None if keep is None else keep[part]
            rows = None if curvature is None else factorize_rows(curvature[blocks])
            begun = (grid.group_size, self.start == "mixture")
            found = gptq_codebook(*own, 2**grid.bits, scale_dtype, self.rounds, stays, rows, *begun)
            levels = found.levels.to(scale_dtype)
            return found.codes, levels.squeeze(1) if grid.group_size == -1 else levels

        sizes = None if curvature is None else [len(block) for block in curvature]
        codes, levels = statistics.in_parts(solve, len(weight), sizes)
        details = self._reported(factor, share)
        return QuantizedWeight(codes, levels, None, grid), details
