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
Vector quantization: neighbours in a row are rounded together to the nearest of a few vectors that the whole weight shares,
or to the sum of several of them, one from each table. Vectors of one weight are a codebook of the whole weight. Rows one
after the other may have a book of tables of their own.

Rows are scaled to a root mean square of one. The vectors begin as weighted k-means of the weight's own
([`hfcompress.solvers.k_means`]; weighted by what errors cost: VPTQ, arXiv 2409.17066), those of a further table as k-means of
what the tables before it leave. Then numbers are told place after place and row after row, with errors fed back along both, so that
`tr(C (V - Q) H (V - Q)^T)` is small: with `H = U D U^T` and `C = W F W^T` that is the sum over rows and places of
`F_i |z_ip D^(1/2)|^2` for `z = W^T (V - Q) U`, of which the rows and places before a number decide all but the vector it
stands for (block LDLQ: QuIP#, arXiv 2402.04396; both sides, entry by entry: [`hfcompress.solvers.two_sided`]). Sums are
searched for with a beam (additive codebooks: AQLM, arXiv 2401.06118). With the numbers held the objective is quadratic in
the vectors, and in the scales, which are improved by conjugate gradients; with both held, numbers are moved one by one to
where it is least. All in turn, and what is best stays.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfcompress.solvers.codebook import best_codebooks, stored
from hfcompress.solvers.conjugate import conjugate_gradients
from hfcompress.solvers.curvature import RowFactor
from hfcompress.solvers.gptq import Factor
from hfcompress.solvers.grid import at_vectors, books_of, codes_dtype
from hfcompress.solvers.k_means import k_means, nearest
from hfcompress.solvers.objective import Objective, blocks, run_kernel


ENOUGH = 1 << 16  # weights from which the vectors are told that are begun with
POINTS = 16  # for each of them, where that is more
CG_STEPS = 12
LEAST = 1e-2  # of a row's scale: what is left of it in a step at least, so that nothing is divided by zero
DESCENTS = 2  # of all numbers, in every round
BEAM = 4  # sums that are followed from table to table


@dataclass(frozen=True)
class Vectors:
    """
    A weight of vectors.

    Args:
        codes (`Tensor`): uint8, or int32 where a table has more than 256 entries, `(out_features, in_features / length,
            tables)`.
        scales (`Tensor`): float32 `(out_features,)`.
        vectors (`Tensor`): float32 `(books, tables, entries, length)`.
        book (`Tensor`): int64 `(out_features,)`: of each row.
    """

    codes: Tensor
    scales: Tensor
    vectors: Tensor
    book: Tensor

    def values(self) -> Tensor:
        """float32 `(out_features, in_features)`."""
        return at_vectors(self.vectors, self.codes, self.book) * self.scales[:, None]

    @property
    def numbers(self) -> Tensor:
        """Of each vector among those of all books and tables: int64, like the codes."""
        _, tables, entries, _ = self.vectors.shape
        return entries * (self.book[:, None, None] * tables + torch.arange(tables)) + self.codes


def gptq_vectors(
    target: Tensor,
    gram: Tensor,
    factor: Factor,
    length: int,
    dtype: torch.dtype,
    rounds: int = 2,
    seed: int = 0,
    entries: int = 256,
    tables: int = 1,
    keep: Tensor | None = None,
    rows: RowFactor | None = None,
    books: int = 1,
    start: str = "k-means++",
    improve: "Callable[[Objective, Vectors, torch.dtype, int], Vectors] | None" = None,
) -> Vectors:
    """
    Numbers, scales and vectors so that `tr(C (V - Q) H (V - Q)^T)` is small, `V` being the target.

    Args:
        target (`Tensor`): `(out_features, in_features)` float32.
        gram (`Tensor`): `H`, `(in_features, in_features)` float32.
        factor (`Factor`): of the Gram matrix, its columns in their own order.
        length (`int`): of a vector.
        dtype (`torch.dtype`): what scales and vectors are stored in.
        rounds (`int`, *optional*, defaults to 2): times that vectors, scales and numbers are improved in turn.
        seed (`int`, *optional*, defaults to 0): of the vectors that k-means begins with.
        entries (`int`, *optional*, defaults to 256): of a table, 2 to 65536.
        tables (`int`, *optional*, defaults to 1): whose vectors are added up.
        keep (`Tensor`, *optional*): bool like the target, for vectors of one weight from one table: the others are zero, and
            remain so.
        rows (`RowFactor`, *optional*): of the outputs, if they are not all worth the same.
        books (`int`, *optional*, defaults to 1): of tables, each for as many rows one after the other.
        start (`str`, *optional*, defaults to `"k-means++"`): see [`hfcompress.solvers.k_means.k_means`].
        improve (`Callable`, *optional*): what is done behind the first sweep; [`improved`] if not given. With
            [`hfcompress.solvers.entropy_constrained.constrained`] numbers are chosen by what they take to store, too.
    """
    objective = Objective.of(target, gram, factor, rows, keep)
    book = books_of(len(target), books)[objective.rows.order]
    found = _begun(objective, book, length, dtype, seed, entries, tables, start)
    found = (improve or improved)(objective, found, dtype, rounds)
    ordered = (objective.rows_unordered(each).to(target.device) for each in (found.codes, found.scales))
    return Vectors(*ordered, found.vectors.to(target.device), books_of(len(target), books).to(target.device))


def _begun(
    objective: Objective,
    book: Tensor,
    length: int,
    dtype: torch.dtype,
    seed: int,
    entries: int,
    tables: int,
    start: str,
) -> Vectors:
    """The first sweep, with k-means of the weights."""
    target, keep = objective.target, objective.keep if objective.sparse else None
    power = target.square().mean(1) if keep is None else target.square().sum(1) / keep.sum(1).clamp(min=1)
    scales = stored(power.sqrt().clamp(min=torch.finfo(dtype).tiny), dtype)
    costs = objective.rest * scales.square()
    begun = []
    for number in range(int(book.max()) + 1):
        own = book == number
        part, stays = target[own] / scales[own, None], None if keep is None else keep[own]
        more = (seed, entries, tables, stays, costs[own], start)
        begun.append(first_vectors(part, objective.importance, length, *more))
    vectors = stored(torch.stack(begun), dtype)
    return Vectors(sweep(objective, scales, vectors, book), scales, vectors, book)


def improved(objective: Objective, found: Vectors, dtype: torch.dtype, rounds: int) -> Vectors:
    """What is best of vectors, scales and numbers improved in turn. See [`gptq_vectors`] for the arguments."""
    best, least = found, objective.loss(found.values())
    for _ in range(rounds):
        found = replace(found, vectors=stored(refitted(objective, found), dtype))
        found = replace(found, scales=stored(rescaled(objective, found), dtype))
        for _ in range(DESCENTS):
            found = replace(found, codes=descend(objective, found))
        loss = objective.loss(found.values())
        if not loss < least:
            break
        best, least = found, loss
    return best


def first_vectors(
    weight: Tensor,
    importance: Tensor,
    length: int,
    seed: int,
    entries: int,
    tables: int,
    keep: Tensor | None = None,
    worth: Tensor | None = None,
    start: str = "k-means++",
) -> Tensor:
    """
    The vectors that a book is begun with: float32 `(tables, entries, length)`, the best there are for single weights. See
    [`gptq_vectors`] for the arguments; where not all weights are kept, the first vector is zero. `worth`, float32
    `(out_features,)`, is what an error in each row costs.
    """
    points = weight.view(-1, length)
    costs = importance.view(-1, length).repeat(len(weight), 1) / importance.mean()
    if worth is not None:
        costs = costs * (worth / worth.mean()).repeat_interleave(weight.shape[1] // length)[:, None]
    stays = None if keep is None else keep.view(-1)
    enough = max(ENOUGH // length, POINTS * entries)
    if len(points) > enough:
        chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:enough]
        points, costs, stays = points[chosen], costs[chosen], None if stays is None else stays[chosen]
    if length == tables == 1:
        levels = best_codebooks(points.T, costs.flatten(), entries, None if stays is None else stays[None])
        return levels.gather(1, levels.abs().sort(dim=1).indices)[..., None]
    found = []
    for table in range(tables):
        vectors = k_means(points, costs, entries, seed + table, start)
        points = points - vectors[nearest(points, costs, vectors)[1]]
        found.append(vectors)
    return torch.stack(found)


def _unpriced(vectors: Tensor) -> Tensor:
    """No vector costs anything besides."""
    return torch.zeros(vectors.shape[:3])


def sweep(
    objective: Objective,
    scales: Tensor,
    vectors: Tensor,
    book: Tensor,
    prices: Tensor | None = None,
    beam: int = BEAM,
) -> Tensor:
    """
    The numbers of the vectors, as [`Vectors`] has them.

    Args:
        objective (`Objective`): of the linear.
        scales (`Tensor`): float32 `(out_features,)`.
        vectors (`Tensor`): float32 `(books, tables, entries, length)`.
        book (`Tensor`): int64 `(out_features,)`: of each row.
        prices (`Tensor`, *optional*): float32 `(books, tables, entries)`: what the choice of each costs besides.
        beam (`int`, *optional*, defaults to 4): sums that are followed from table to table.
    """
    from hfcompress.kernels.vectors import round_vectors

    target, feedback, rows = objective.target, objective.feedback, objective.rows
    columns, (_, tables, entries, length) = target.shape[1], vectors.shape
    prices = _unpriced(vectors) if prices is None else prices
    spreads = objective.importance.sqrt()
    carried = torch.zeros_like(target)
    codes = torch.empty(len(target), columns // length, tables, dtype=codes_dtype(entries))
    for part in blocks(columns, length):
        places = slice(part.start // length, part.stop // length)
        within = feedback[part, part]
        roots = (_diagonal(within, length) + torch.eye(length)) * spreads[part].view(-1, 1, length)
        fed = carried[:, : part.start] @ feedback[: part.start, part]
        found = (codes[:, places].contiguous(), torch.empty_like(fed))
        own = (fed, target[:, part], scales, objective.rest, vectors, book, roots, spreads[part], prices, within.T)
        own = (*own, rows.feedback, rows.starts, rows.stops, objective.keep[:, part], beam)
        run_kernel(round_vectors, *own, written=found)
        codes[:, places], carried[:, part] = found
    return codes


def descend(objective: Objective, found: Vectors, prices: Tensor | None = None, beam: int = BEAM) -> Tensor:
    """The numbers once each has been moved to its best value, one after the other. See [`sweep`] for the arguments."""
    from hfcompress.kernels.vectors import descend_vectors

    rows, gram, curvature = objective.rows, objective.gram, objective.curvature
    length = found.vectors.shape[3]
    prices = _unpriced(found.vectors) if prices is None else prices
    slopes = objective.slopes(objective.target - found.values())
    moved, codes = torch.zeros_like(slopes), found.codes.clone()
    for part in blocks(len(gram), length):
        places = slice(part.start // length, part.stop // length)
        within = gram[part, part]
        roots = torch.linalg.cholesky(_diagonal(within, length))
        own = slopes[:, part] - moved[:, : part.start] @ gram[: part.start, part]
        changed = (codes[:, places].contiguous(), torch.zeros_like(own))
        held = (
            own,
            found.scales,
            found.vectors,
            found.book,
            roots,
            torch.linalg.inv(roots),
            prices,
            within,
            curvature,
        )
        run_kernel(descend_vectors, *held, rows.starts, rows.stops, objective.keep[:, part], beam, written=changed)
        codes[:, places], moved[:, part] = changed
    return codes


def _diagonal(matrix: Tensor, length: int) -> Tensor:
    """The blocks along the diagonal: `(places, length, length)`."""
    return torch.stack([matrix[i : i + length, i : i + length] for i in range(0, len(matrix), length)])


def refitted(objective: Objective, found: Vectors) -> Tensor:
    """
    The vectors that are better for the numbers: a few steps of conjugate gradients from those at hand. Where some weights
    are zero, so remains the first.
    """
    books, tables, entries, length = found.vectors.shape
    numbers = found.numbers.view(-1, tables)
    places = (numbers[:, None] * length + torch.arange(length)[:, None]).flatten(0, 1)  # of weights in all tables

    def gathered(each: Tensor) -> Tensor:
        """Sums over all places of a vector, of what belongs to each weight."""
        parts = (each * found.scales[:, None]).flatten()
        total = torch.zeros(books, tables * entries * length)
        for table in range(tables):
            total.view(-1).scatter_add_(0, places[:, table], parts)  # many times faster than index_add_ on a CPU
        if objective.sparse:
            total[:, :length] = 0
        return total.view_as(found.vectors)

    def curved(vectors: Tensor) -> Tensor:
        return gathered(objective.slopes(replace(found, vectors=vectors).values()))

    diagonal = gathered((objective.worth * found.scales)[:, None] * objective.gram.diagonal())
    residual = gathered(objective.slopes(objective.target - found.values()))
    return found.vectors + _conjugate(residual, diagonal, curved)


def rescaled(objective: Objective, found: Vectors) -> Tensor:
    """The scales of the rows that are better for the numbers, likewise: float32 `(out_features,)`."""
    values = replace(found, scales=torch.ones_like(found.scales)).values()

    def curved(scales: Tensor) -> Tensor:
        return (objective.slopes(values * scales[:, None]) * values).sum(1)

    diagonal = objective.worth * ((values @ objective.gram) * values).sum(1)
    residual = (objective.slopes(objective.target - found.values()) * values).sum(1)
    scales = found.scales + _conjugate(residual, diagonal, curved)
    return torch.where(scales.abs() > LEAST * found.scales.abs(), scales, found.scales)


def _conjugate(residual: Tensor, diagonal: Tensor, curved: Callable[[Tensor], Tensor]) -> Tensor:
    diagonal.clamp_(min=1e-6 * diagonal.mean().item() + 1e-30)
    return conjugate_gradients(residual, diagonal, curved, lambda each: each.sum(dtype=torch.float64), CG_STEPS)
