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
"""The grid of codes that a weight is rounded to, and the rounded weight itself."""

from dataclasses import dataclass

import torch
from torch import Tensor


E4M3 = torch.float8_e4m3fn
LARGEST = 127  # of the codes that are entropy-coded


@dataclass(frozen=True)
class Grid:
    """
    Codes `q` of a few bits that stand for the values `(q - zero_point) * scale`, one scale per row and group of
    columns.

    Integer codes are those in `[-2**(bits-1), 2**(bits-1) - 1]`. Such a grid without a zero point is symmetric; its
    scale may be negative, so that all `2**bits` levels are used whichever side the larger values are on. Codes of type
    `"float"` are the values of E4M3 (8 bits, no infinity, largest 448; arXiv 2209.05433), always symmetric. Those of type
    `"plain"` are the values of the dtype that the weight is stored in: nothing is rounded further. Those of type `"coded"`
    are integers in [-127, 127] with a step for every row and every column, which take as many bits as they are worth.
    Those of type `"codebook"` are from 0 up, and number the levels that a row or a group has of its own; those of type `"vector"` number
    vectors, of which one, or the sum of one from each of several tables, stands for `group_size` neighbours in a row. A weight of type `"factors"` is a product of two.

    Args:
        bits (`int`): bits per code, 2 to 8; 8 for `"float"` and `"coded"`, of no meaning for `"vector"`.
        group_size (`int`): columns that share a scale; -1 for the whole row.
        symmetric (`bool`): no zero point.
        type (`str`): `"int"`, `"float"`, `"plain"`, `"coded"`, `"codebook"`, `"vector"` or `"factors"`.
        activations (`str`): how the linear's inputs are rounded when it runs, to 8 bits of the same type: `"none"`,
            `"dynamic"` (a scale per token) or `"static"` (one stored scale). The codes do not depend on it, but what a
            reader does with them does.
        rate (`float`, *optional*): for `"coded"` and `"factors"`, the bits that a weight takes on average, everything
            counted; for `"vector"`, those of numbers.
        rank (`int`, *optional*, defaults to 0): for `"factors"`, the columns of the first.
        base (`int`, *optional*): for `"factors"`, the number of the block whose weight the product is added to.
        tables (`int`, *optional*, defaults to 1): for `"vector"`, of vectors.
        rows (`int`, *optional*, defaults to 0): for `"vector"`, how many share vectors at most; 0 for all.
        limit (`float`, *optional*): for `"vector"`, the bits that a weight takes on average, everything counted, where numbers
            were chosen for that.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    type: str = "int"
    activations: str = "none"
    rate: float | None = None
    rank: int = 0
    base: int | None = None
    tables: int = 1
    rows: int = 0
    limit: float | None = None

    @property
    def bits_on_average(self) -> float:
        """What a weight takes, scales left out but for `"coded"` and `"factors"`."""
        if self.limit is not None:
            return self.limit
        return self.bits if self.rate is None else self.rate

    def books(self, out_features: int) -> int:
        """Of vectors, for so many rows."""
        return 1 if self.rows == 0 else -(-out_features // self.rows)

    @property
    def entries(self) -> int:
        """Vectors in a table."""
        return 2 ** round((self.bits if self.rate is None else self.rate) * self.group_size / self.tables)

    @property
    def q_min(self) -> int:
        if self.type == "coded":
            return -LARGEST
        return -(2 ** (self.bits - 1)) if self.type == "int" else int(torch.finfo(E4M3).min)

    @property
    def q_max(self) -> int:
        if self.type == "coded":
            return LARGEST
        return 2 ** (self.bits - 1) - 1 if self.type == "int" else int(torch.finfo(E4M3).max)

    @property
    def is_plain(self) -> bool:
        """Whether the weight is stored as it is."""
        return self.type == "plain"

    @property
    def dtype(self) -> torch.dtype:
        """What the codes are held in."""
        return E4M3 if self.type == "float" else torch.int8

    def columns(self, in_features: int) -> int:
        """Columns per group for a weight that is `in_features` wide."""
        return in_features if self.group_size == -1 else self.group_size

    def round(self, values: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
        """The codes nearest to `values`, as floats; all arguments broadcast against each other."""
        codes = values / scales
        if self.type == "float":
            return codes.clamp_(self.q_min, self.q_max).to(E4M3).to(values.dtype)  # the cast rounds to nearest, even
        codes = torch.round(codes)
        if zero_points is not None:
            codes += zero_points
        return codes.clamp_(self.q_min, self.q_max)


def at_levels(levels: Tensor, codes: Tensor) -> Tensor:
    """
    What codes stand for: `(out_features, in_features)` like these, in the dtype of the levels, `(out_features, size)` or, where
    groups of neighbours have levels of their own, `(out_features, groups, size)`.
    """
    own = levels.flatten(0, -2)
    return own.gather(1, codes.long().view(len(own), -1)).view(codes.shape)


def codes_dtype(entries: int) -> torch.dtype:
    """What the numbers of so many vectors are held in."""
    return torch.uint8 if entries <= 256 else torch.int32


def books_of(rows: int, books: int) -> Tensor:
    """Which book of vectors each row has, as many rows one after the other having the same: int64 `(rows,)`."""
    return torch.arange(rows) // -(-rows // books)


def at_vectors(vectors: Tensor, codes: Tensor, book: Tensor | None = None) -> Tensor:
    """
    What numbers stand for: `(out_features, in_features)` in the dtype of the vectors.

    Args:
        vectors (`Tensor`): `(books, tables, entries, length)`.
        codes (`Tensor`): integers `(out_features, in_features / length, tables)`: of which one vector each is added up.
        book (`Tensor`, *optional*): int64 `(out_features,)`: of each row; [`books_of`] if left out.
    """
    books, tables, entries, _ = vectors.shape
    book = books_of(len(codes), books).to(codes.device) if book is None else book
    every, first = vectors.flatten(0, 2), (entries * tables * book).int()[:, None]
    total = every[first + codes[..., 0].int()]
    for table in range(1, tables):
        total = total + every[first + entries * table + codes[..., table].int()]
    return total.flatten(1)


def shortest_first(vectors: Tensor, codes: Tensor, book: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same values, the vectors of each table in the order of their lengths. The arguments are those of [`at_vectors`]."""
    books, tables, _, _ = vectors.shape
    book = books_of(len(codes), books).to(codes.device) if book is None else book
    order = vectors.float().square().sum(-1).sort(dim=-1, stable=True).indices
    ranks = order.argsort(-1)[book[:, None, None], torch.arange(tables, device=codes.device), codes.int()]
    return vectors.gather(2, order[..., None].expand_as(vectors)).contiguous(), ranks.to(codes.dtype)


@dataclass(frozen=True)
class QuantizedWeight:
    """
    A weight on a grid.

    Args:
        codes (`Tensor`): int8, or float8_e4m3fn on a float grid, `(out_features, in_features)`; of type `"factors"` the
            first factor, `(out_features, rank)`.
        scales (`Tensor`): `(out_features, groups)` in the dtype that is stored; on a grid of type `"codebook"` the levels,
            `(out_features, 2^bits)` or, with groups, `(out_features, groups, 2^bits)`; of type `"factors"` the second factor, `(rank, in_features)`.
        zero_points (`Tensor` or `None`): int8 `(out_features, groups)`; `None` for a symmetric grid.
        grid (`Grid`): the grid.
        column_scales (`Tensor`, *optional*): float32 `(in_features,)`: factors of the columns, on a grid of type `"coded"`.
        vectors (`Tensor`, *optional*): `(books, tables, entries, group_size)`, on a grid of type `"vector"`, where `codes` are
            uint8, or int32 where there are more than 256 entries, `(out_features, in_features / group_size, tables)`.
        base (`Tensor`, *optional*): float32 `(out_features, in_features)`: what the product of factors is added to.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    grid: Grid
    column_scales: Tensor | None = None
    vectors: Tensor | None = None
    base: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The values `(codes - zero_points) * scales (* column_scales)`: float32 `(out_features, in_features)`."""
        if self.grid.type == "factors":  # summed in float64, so that every device and thread count agrees
            product = (self.codes.double() @ self.scales.double()).float()
            return product if self.base is None else self.base + product
        if self.grid.type == "codebook":
            return at_levels(self.scales.float(), self.codes)
        if self.vectors is not None:
            return at_vectors(self.vectors.float(), self.codes) * self.scales.float()
        out_features, in_features = self.codes.shape
        values = self.codes.float().view(out_features, self.scales.shape[1], -1)
        if self.zero_points is not None:
            values = values - self.zero_points.float().unsqueeze(-1)
        values = (values * self.scales.float().unsqueeze(-1)).view(out_features, in_features)
        return values if self.column_scales is None else values * self.column_scales

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same on another device."""
        zero_points = None if self.zero_points is None else self.zero_points.to(device)
        columns = None if self.column_scales is None else self.column_scales.to(device)
        vectors = None if self.vectors is None else self.vectors.to(device)
        base = None if self.base is None else self.base.to(device)
        own = (self.codes.to(device), self.scales.to(device), zero_points)
        return QuantizedWeight(*own, self.grid, columns, vectors, base)

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """The part of it that belongs to output rows `start` to `stop`: of several books of vectors, all."""
        assert self.vectors is None or len(self.vectors) == 1 or (start, stop) == (0, len(self.codes))
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        scales = self.scales if self.grid.type == "factors" else self.scales[start:stop]
        own = (self.codes[start:stop], scales, zero_points)
        base = None if self.base is None else self.base[start:stop]
        return QuantizedWeight(*own, self.grid, self.column_scales, self.vectors, base)
