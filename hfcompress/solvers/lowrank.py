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
Weights of low rank: `W' = A B` so that `tr(C (V - A B) H (V - A B)^T)` is small, `V` being the target.

With `C = L L^T` and `M = L^T V`, the eigenvectors `U` of `M H M^T` solve it for every rank at once: the best of rank `k` is
`L^-T U_k U_k^T M`, and it loses the sum of the eigenvalues after the first `k` (Eckart and Young in the norm of the data;
Swift-SVD, arXiv 2604.01609; SVD-LLM, arXiv 2403.07378). Where a weight is taller than wide, they are told from the smaller
`S^T M^T M S`, `H = S S^T`.

Because eigenvalues only fall, ranks of many linears under one budget are found by one price per parameter: each takes the
rank at which what it loses and what it pays are least together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.solvers.curvature import DAMPING


NEGLIGIBLE = 1e-12  # of the largest eigenvalue, below which there is no direction
HALVINGS = 80
FLOOR = 0.5  # of the rank that all would have alike: below it predictions suffer more than eigenvalues say


@dataclass(frozen=True)
class Spectrum:
    """
    A weight by directions of its outputs, the ones that carry most first.

    Args:
        values (`Tensor`): float64 `(directions,)`: eigenvalues, descending: what is lost where a direction is left out.
        left (`Tensor`): float64 `(out_features, directions)`.
        right (`Tensor`): float64 `(directions, in_features)`: the weight is the product of both.
    """

    values: Tensor
    left: Tensor
    right: Tensor

    def lost(self) -> Tensor:
        """What is lost at rank 0, 1, ... : float64 `(directions + 1,)`."""
        tails = self.values.flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])

    def truncated(self, rank: int, shrinkage: float = 0.0) -> tuple[Tensor, Tensor]:
        """
        Both factors at a rank: float32 `(out_features, rank)` and `(rank, in_features)`, their columns and rows of like
        size. What the weight has too few directions for is zero.

        Args:
            rank (`int`): of the product.
            shrinkage (`float`, *optional*, defaults to 0.0): singular values are made smaller by this share of the
                largest that is left out. With 1.0 the result is the one of least
                `tr(C (V - W') H (V - W')^T) / 2 + t |L^T W' S|_*` at the price `t` that leaves `rank` directions (the
                nuclear norm; Cai, Candes and Shen, arXiv 0810.3286).
        """
        kept = min(rank, len(self.values))
        singular = self.values[:kept].sqrt()
        dropped = self.values[kept].sqrt() if kept < len(self.values) else singular.new_zeros(())
        sizes = (1 - shrinkage * dropped / singular.clamp(min=1e-300)).clamp(min=0)
        left, right = self.left[:, :kept], self.right[:kept] * sizes[:, None]
        balance = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-300)).sqrt().clamp(min=1e-150)
        left, right = left * balance, right / balance[:, None]
        missing = rank - kept
        return (
            torch.nn.functional.pad(left, (0, missing)).float().contiguous(),
            torch.nn.functional.pad(right, (0, 0, 0, missing)).float().contiguous(),
        )


def spectrum(target: Tensor, gram: Tensor, curvature: Sequence[Tensor] | None = None) -> Spectrum:
    """
    Args:
        target (`Tensor`): `V`, `(out_features, in_features)`.
        gram (`Tensor`): `H`, positive definite, `(in_features, in_features)`.
        curvature (`Sequence[Tensor]`, *optional*): `C` block by block along its diagonal, `(rows, rows)` each; without it
            all outputs are worth the same.

    Raises:
        torch.linalg.LinAlgError: the Gram matrix is not positive definite.
    """
    target, gram = target.double(), gram.double()
    roots = None if curvature is None else [_root(block.to(target.device)) for block in curvature]
    weighed = target if roots is None else _in_blocks(roots, target, lambda root, rows: root.T @ rows)
    tall = len(target) > len(gram)
    if tall:
        wide = weighed @ torch.linalg.cholesky(gram)
        values, vectors = torch.linalg.eigh(wide.T @ wide)
    else:
        values, vectors = torch.linalg.eigh(weighed @ gram @ weighed.T)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = int((values > NEGLIGIBLE * values[0].clamp(min=1e-300)).sum())
    values, vectors = values[:kept], vectors[:, :kept]
    if tall:
        vectors = wide @ vectors / values.sqrt()
    left = vectors if roots is None else _in_blocks(roots, vectors, _unweighed)
    return Spectrum(values, left, vectors.T @ weighed)


def _root(block: Tensor) -> Tensor:
    """The lower triangular `L` of `L L^T`, of a block of `C` damped as in the sweeps."""
    block = block.double()
    mean = block.diagonal().mean().clamp(min=1e-300)
    return torch.linalg.cholesky(
        block + DAMPING * mean * torch.eye(len(block), dtype=block.dtype, device=block.device)
    )


def _unweighed(root: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(root.T, rows, upper=True)


def _in_blocks(roots: Sequence[Tensor], rows: Tensor, change) -> Tensor:
    parts = rows.split([len(root) for root in roots])
    return torch.cat([change(root, part) for root, part in zip(roots, parts, strict=True)])


def rank_at(ratio: float, shape: tuple[int, int], multiple: int) -> int:
    """
    The rank at which two factors hold `ratio` of a weight's parameters: a multiple of `multiple`, at least one of it.

    Args:
        ratio (`float`): above 0, below 1.
        shape (`tuple[int, int]`): of the weight.
        multiple (`int`): what ranks are multiples of.
    """
    rows, columns = shape
    return max(multiple, int(ratio * rows * columns / (rows + columns)) // multiple * multiple)


def worth_factoring(rank: int, shape: tuple[int, int]) -> bool:
    """Whether two factors of this rank hold fewer parameters than the weight."""
    return rank * sum(shape) < shape[0] * shape[1]


def ranks_within(
    lost: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], ratio: float, multiple: int
) -> dict[str, int | None]:
    """
    The ranks at which linears lose least together and hold `ratio` of their parameters at most.

    Args:
        lost (`Mapping[str, Tensor]`): for every linear what it loses at rank 0, 1, ..., in units that compare.
        shapes (`Mapping[str, tuple[int, int]]`): of the weights.
        ratio (`float`): above 0, below 1.
        multiple (`int`): what ranks are multiples of.

    Returns:
        `dict`: the rank of each; `None` for a linear that stays whole.
    """
    options, losses, prices = {}, {}, {}
    for name, shape in shapes.items():
        least = rank_at(FLOOR * ratio, shape, multiple)
        ranks = [rank for rank in range(least, min(shape), multiple) if worth_factoring(rank, shape)]
        options[name] = [*ranks, None]
        ends = lost[name].new_zeros(min(shape) + 1 - len(lost[name]))
        losses[name] = torch.cat([torch.cat([lost[name], ends])[ranks], ends.new_zeros(1)])
        paid = [rank * sum(shape) for rank in ranks] + [shape[0] * shape[1]]
        prices[name] = torch.tensor(paid, dtype=torch.float64)
    budget = ratio * sum(rows * columns for rows, columns in shapes.values())

    def at(price: float) -> dict[str, int]:
        return {name: int((losses[name].cpu() + price * prices[name]).argmin()) for name in shapes}

    low, high = -60.0, 60.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        taken = sum(prices[name][place].item() for name, place in at(2.0**middle).items())
        low, high = (middle, high) if taken > budget else (low, middle)
    return {name: options[name][place] for name, place in at(2.0**high).items()}
