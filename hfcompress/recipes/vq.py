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
"""Neighbouring weights rounded together."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.coded import Coded, refuse_zeros


LENGTHS = (1, 2, 4, 8)
FAR = 0.02  # of the rate: what is told of
MOST = 8  # weights of a vector, tables, and bits of a number where the length is not given
WIDEST = 16  # bits of a number
STARTS = ("k-means++", "split")


@dataclass(frozen=True, kw_only=True)
class VQ(Coded):
    """
    Vector quantization: neighbours in a row are rounded together to one of a few vectors that a weight shares, or to
    the sum of several, errors fed back as in GPTQ. The numbers are entropy-coded where that takes fewer bytes. Vectors of
    `length` 1 are a codebook for the whole weight, whose zeros `sparsify` may have left.

    Args:
        bits (`float`, *optional*, defaults to 2): bits per weight. A number takes `bits * length / tables` of them, which has to
            be whole, from 1 to 16. Tables of more than 256 vectors take longer to search, and pay only in large weights: 2^12 of 4
            weights take 32 kB in float16.
        rate (`float`, *optional*): what a weight takes when it is stored, everything counted, less than `bits`: numbers are
            chosen by what an entropy coder spends on them, too (entropy-constrained vector quantization), so that many vectors
            can be had for few bits. From one table of at most 256, and without zeros of `sparsify`. Where it was measured on a trained model it
            lost more than `entropy` at the same rate, whose steps know how much each row and column matters.
        length (`int`, *optional*): weights of a vector; if left out, the longest of 8, 4, 2 and 1 with which a number takes no
            more than 8 bits.
        tables (`int`, *optional*, defaults to 1): of vectors, of which one each is added up (additive quantization): with
            two there are as many as 65536 sums.
        rows (`int`, *optional*): of a weight that share tables, at most; all if left out.
        start (`str`, *optional*, defaults to `"k-means++"`): what vectors begin with: points drawn far from one another, or
            `"split"`, their mean, split in two again and again (LBG).
        damping (`float`, *optional*, defaults to 0.1): added to the diagonal of the Gram matrix, as a share of its
            mean.
        shift (`float`, *optional*, defaults to 1.0): how much each linear may make up for what was lost before it, as in
            [`GPTQ`].
        curvature (`bool`, *optional*, defaults to `True`): weigh errors by what each output is worth to the model's
            predictions, found by backward passes through the dense model.
        rounds (`int`, *optional*, defaults to 3): times that vectors, scales and numbers are improved in turn.
        seed (`int`, *optional*, defaults to 0): of the vectors that are begun with.
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
        overrides (`Mapping[str, Mapping]`, *optional*): see [`Recipe`].
    """

    name: ClassVar[str] = "vq"
    needs_inputs: ClassVar[bool] = True
    looks_up: ClassVar[bool] = True
    type: ClassVar[str] = "vector"
    trainable: ClassVar[bool] = True
    alone: ClassVar[bool] = True

    bits: float = 2
    rate: float | None = None
    length: int | None = None
    tables: int = 1
    rows: int | None = None
    start: str = "k-means++"
    damping: float = 0.1
    shift: float = 1.0
    curvature: bool = True
    rounds: int = 3
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._check_shares("damping", "shift")
        for key in ("rounds", "seed"):
            if getattr(self, key) < 0:
                raise InvalidValueError(f"vq.{key} is {getattr(self, key)}; it must not be negative.")
        for key in ("length", "tables"):
            if getattr(self, key) is not None and not 1 <= getattr(self, key) <= MOST:
                raise InvalidValueError(f"vq.{key} is {getattr(self, key)}; it must be from 1 to {MOST}.")
        if self.rows is not None and self.rows < 1:
            raise InvalidValueError(f"vq.rows is {self.rows}; it must be positive.")
        if self.start not in STARTS:
            raise InvalidValueError(f"vq.start is {self.start!r}; choose {' or '.join(STARTS)}.")
        each = self.bits * self.group_size / self.tables
        if each not in range(1, WIDEST + 1):
            raise InvalidValueError(
                f"vq.bits {self.bits:g} for vectors of {self.group_size} from {self.tables} tables would take {each:g} bits a "
                f"number; choose bits, length and tables so that bits * length / tables is a whole number from 1 to {WIDEST}."
            )
        if self.rate is not None and not (0 < self.rate < self.bits and self.tables == 1 and each <= MOST):
            raise InvalidValueError(
                f"vq.rate is {self.rate:g}, with vq.bits {self.bits:g} and {self.tables} tables, numbers taking {each:g} bits; it "
                f"is for one table and numbers of at most {MOST} bits, and must lie between 0 and bits."
            )

    def check_place(self, before, after):
        """A vector of several weights keeps no zeros."""
        super().check_place(before, after)
        if (self.group_size, self.tables) != (1, 1) or self.rate is not None:
            refuse_zeros(self.name, before)

    @property
    def needs_curvature(self) -> bool:
        """Whether the outputs' worth to the predictions is asked for."""
        return self.curvature

    @property
    def group_size(self) -> int:
        """Weights of a vector, which have to divide a row."""
        if self.length is not None:
            return self.length
        fitting = [length for length in LENGTHS if self.bits * length / self.tables in range(1, MOST + 1)]
        return max(fitting, default=1)

    def quantize(self, weight, statistics, grid, scale_dtype, linears, curvature=None, keep=None):
        """See `passes.plan.Quantizer`."""
        from hfcompress.solvers.curvature import factorize_rows
        from hfcompress.solvers.entropy_constrained import constrained, rate
        from hfcompress.solvers.grid import QuantizedWeight
        from hfcompress.solvers.vectors import gptq_vectors

        factor = statistics.factor(self.damping, False, linears)
        target, share = statistics.target(weight, self.damping, False, linears, self.shift)
        own = (target, statistics.gram, factor, grid.group_size, scale_dtype, self.rounds, self.seed)
        rows = None if curvature is None else factorize_rows(curvature)
        improve = None if self.rate is None else partial(constrained, bits=self.rate)
        books = grid.books(len(weight))
        found = gptq_vectors(*own, grid.entries, grid.tables, keep, rows, books, self.start, improve)
        details = self._reported(factor, share)
        if self.rate is not None:
            bits = rate(found)
            if abs(bits - self.rate) > FAR * self.rate:
                details["fallback"] = f"{bits:.2f} bits a weight, where {self.rate:g} were asked for: see vq.rate"
        scales, vectors = found.scales[:, None].to(scale_dtype), found.vectors.to(scale_dtype)
        return QuantizedWeight(found.codes, scales, None, grid, vectors=vectors), details
