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
"""Where the zeros of a weight may lie: N of every M neighbours of a row, anywhere, or in whole blocks."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfcompress.errors import InvalidValueError


if TYPE_CHECKING:
    from torch import Tensor


UNSTRUCTURED = "unstructured"
MOST = 32  # neighbours in a group


@dataclass(frozen=True)
class Pattern:
    """
    Args:
        kept (`int`): entries that stay in every group of neighbouring columns, or 0 where their number is free.
        rows (`int`): rows of a block whose entries stay or go together.
        columns (`int`): columns of such a block, or of a group.
        sparsity (`float`): the share of zeros.
    """

    kept: int
    rows: int
    columns: int
    sparsity: float

    @classmethod
    def parse(cls, text: str, sparsity: float = 0.5) -> "Pattern":
        """
        Args:
            text (`str`): `"N:M"` (N of every M neighbours stay), `"unstructured"`, or `"RxC"` (blocks of R rows and C
                columns stay or go whole).
            sparsity (`float`, *optional*, defaults to 0.5): the share of zeros, where the pattern does not say it.

        Raises:
            InvalidValueError: it is no pattern.
        """
        if text == UNSTRUCTURED:
            return cls(0, 1, 1, sparsity)
        found = re.fullmatch(r"(\d{1,3})([:x])(\d{1,3})", text)
        first, second = (int(found[1]), int(found[3])) if found else (0, 0)
        if found and found[2] == ":" and 0 < first < second <= MOST:
            return cls(first, 1, second, 1 - first / second)
        if found and found[2] == "x" and first and second:
            return cls(0, first, second, sparsity)
        raise InvalidValueError(
            f"'{text}' is no sparsity pattern; write N:M with N below M and M at most {MOST}, such as 2:4 (2 of every 4 "
            "weights stay), unstructured, or RxC, such as 16x1, for whole blocks."
        )

    @property
    def is_grouped(self) -> bool:
        """Whether every group of `columns` neighbours keeps the same number of entries."""
        return self.kept > 0

    @property
    def zeros(self) -> int:
        """Zeros in every group, where their number is fixed."""
        return self.columns - self.kept if self.is_grouped else 0

    def fits(self, out_features: int, in_features: int) -> bool:
        """Whether a weight can be divided into such groups or blocks."""
        return not (out_features % self.rows or in_features % self.columns)

    def mask(self, scores: "Tensor", by_row: bool = False) -> "Tensor":
        """
        Keep the entries, or the blocks, with the highest scores.

        Args:
            scores (`Tensor`): `(out_features, in_features)`; what zeroing an entry costs.
            by_row (`bool`, *optional*, defaults to `False`): let every row, or row of blocks, keep as many as any other.

        Returns:
            `Tensor`: bool `(out_features, in_features)`: what stays.
        """
        import torch

        rows, columns = scores.shape
        if self.is_grouped:
            return self.best_of_groups(scores.T).T.contiguous()
        blocks = scores.reshape(rows // self.rows, self.rows, columns // self.columns, self.columns).sum((1, 3))
        compared = blocks if by_row else blocks.flatten().unsqueeze(0)
        count = compared.shape[1] - round(self.sparsity * compared.shape[1])
        best = compared.topk(count, dim=-1).indices
        stays = torch.zeros_like(compared, dtype=torch.bool).scatter_(-1, best, True).view_as(blocks)
        return stays.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def best_of_groups(self, scores: "Tensor") -> "Tensor":
        """
        [`mask`] where every group keeps a number, for scores `(in_features, out_features)`; of equals the first stays.
        """
        import torch

        groups = scores.unflatten(0, (-1, self.columns)).unbind(1)
        better = [torch.zeros_like(each, dtype=torch.int8) for each in groups]
        for second in range(1, self.columns):
            for first in range(second):
                beaten = groups[first] < groups[second]
                better[first] += beaten
                better[second] += ~beaten
        return torch.stack([each < self.kept for each in better], 1).flatten(0, 1)

    def excess(self, values: "Tensor") -> float:
        """
        How many groups of `values` `(out_features, in_features)` hold more than the pattern allows; where it fixes no
        number for a group, how many more of its blocks hold anything than their share. What is below one is rounding.
        """
        rows, columns = values.shape
        nonzero = values != 0
        if self.is_grouped:
            return float((nonzero.view(rows, -1, self.columns).sum(-1) > self.kept).sum())
        blocks = nonzero.view(rows // self.rows, self.rows, columns // self.columns, self.columns).any(3).any(1)
        return blocks.sum().item() - blocks.numel() * (1 - self.sparsity)

    def holds(self, values: "Tensor") -> bool:
        """Whether the zeros of `values` `(out_features, in_features)` lie as the pattern asks for."""
        return self.excess(values) < 1
