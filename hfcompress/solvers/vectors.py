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
or to the sum of several of them, one from each table. Vectors of one weight are a codebook of the whole weight.

Rows are scaled to a root mean square of one. The vectors begin as weighted k-means of the weight's own (LBG; Linde, Buzo
and Gray 1980; weighted by what errors cost: VPTQ, arXiv 2409.17066), those of a further table as k-means of what the
tables before it leave. Then errors are fed back as in GPTQ, vector after vector: with `H = U D U^T` and `T` the unit upper
triangular part of `U` among the columns of one vector, what is rounded there is `y = w + f T^-1`, `f` being the feedback of
all columns before, and an error costs `|(y - q) T D^(1/2)|^2` (block LDLQ: QuIP#, arXiv 2402.04396). Sums are searched for
with a beam (additive codebooks: AQLM, arXiv 2401.06118). With the numbers held, `tr((V - Q) H (V - Q)^T)` is quadratic in
the vectors, which are improved by conjugate gradients; both in turn, and what is best stays.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfcompress.solvers.codebook import best_codebooks
from hfcompress.solvers.gptq import BLOCK, Factor


ENOUGH = 1 << 16  # weights from which the vectors are told that are begun with
ROUNDS_OF_MEANS = 20
CG_STEPS = 12
BEAM = 4  # sums that are followed from table to table


@dataclass(frozen=True)
class Vectors:
    """
    A weight of vectors.

    Args:
        codes (`Tensor`): uint8 `(out_features, in_features / length, tables)`.
        scales (`Tensor`): float32 `(out_features,)`.
        vectors (`Tensor`): float32 `(tables, entries, length)`.
    """

    codes: Tensor
    scales: Tensor
    vectors: Tensor

    def values(self) -> Tensor:
        """float32 `(out_features, in_features)`."""
        return summed(self.vectors, self.codes).flatten(1) * self.scales[:, None]


def summed(vectors: Tensor, codes: Tensor) -> Tensor:
    """The sums of one vector of each table: `(*, length)` for `(tables, entries, length)` and uint8 `(*, tables)`."""
    total = vectors[0][codes[..., 0].int()]
    for table in range(1, len(vectors)):
        total = total + vectors[table][codes[..., table].int()]
    return total


@dataclass(frozen=True)
class Inputs:
    """
    What the sweep needs of the inputs.

    Args:
        feedback (`Tensor`): strictly upper triangular part of `U`, float32 `(in_features, in_features)`.
        importance (`Tensor`): `D`, float32 `(in_features,)`.
    """

    feedback: Tensor
    importance: Tensor


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
) -> Vectors:
    """
    Numbers, scales and vectors so that `tr((V - Q) H (V - Q)^T)` is small, `V` being the target.

    Args:
        target (`Tensor`): `(out_features, in_features)` float32.
        gram (`Tensor`): `H`, `(in_features, in_features)` float32.
        factor (`Factor`): of the Gram matrix, its columns in their own order.
        length (`int`): of a vector.
        dtype (`torch.dtype`): what scales and vectors are stored in.
        rounds (`int`, *optional*, defaults to 2): times that vectors are improved, and numbers swept anew.
        seed (`int`, *optional*, defaults to 0): of the vectors that k-means begins with.
        entries (`int`, *optional*, defaults to 256): of a table, 2 to 256.
        tables (`int`, *optional*, defaults to 1): whose vectors are added up.
        keep (`Tensor`, *optional*): bool like the target, for vectors of one weight from one table: the others are zero, and
            remain so.
    """
    device, target = target.device, target.cpu()
    keep = None if keep is None else keep.cpu().contiguous()
    damped = factor.damped(gram).cpu()
    inputs = Inputs(factor.feedback.cpu(), factor.importance.cpu())
    power = target.square().mean(1) if keep is None else target.square().sum(1) / keep.sum(1).clamp(min=1)
    scales = _stored(power.sqrt().clamp(min=torch.finfo(dtype).tiny), dtype)
    begun = first_vectors(target / scales[:, None], inputs.importance, length, seed, entries, tables, keep)
    vectors = _stored(begun, dtype)
    best = now = Vectors(sweep(target, scales, vectors, inputs, keep), scales, vectors)
    least = loss(target, best, damped)
    for _ in range(rounds):
        vectors = _stored(refitted(target, now, damped, keep is not None), dtype)
        now = Vectors(sweep(target, scales, vectors, inputs, keep), scales, vectors)
        found = loss(target, now, damped)
        if found < least:
            best, least = now, found
    return Vectors(best.codes.to(device), best.scales.to(device), best.vectors.to(device))


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype).float()


def loss(target: Tensor, found: Vectors, gram: Tensor) -> float:
    """The objective."""
    error = target - found.values()
    return ((error @ gram) * error).sum(dtype=torch.float64).item()


def first_vectors(
    weight: Tensor, importance: Tensor, length: int, seed: int, entries: int, tables: int, keep: Tensor | None = None
) -> Tensor:
    """
    The vectors that are begun with: float32 `(tables, entries, length)`, the best there are for single weights. See
    [`gptq_vectors`] for the arguments; where not all weights are kept, the first vector is zero.
    """
    points = weight.view(-1, length)
    costs = importance.view(-1, length).repeat(len(weight), 1) / importance.mean()
    stays = None if keep is None else keep.view(-1)
    if points.numel() > ENOUGH:
        chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[: ENOUGH // length]
        points, costs, stays = points[chosen], costs[chosen], None if stays is None else stays[chosen]
    if length == tables == 1:
        levels = best_codebooks(points.T, costs.flatten(), entries, None if stays is None else stays[None])
        return levels.gather(1, levels.abs().sort(dim=1).indices)[..., None]
    found = []
    for table in range(tables):
        vectors = k_means(points, costs, entries, seed + table)
        points = points - vectors[_distances(points, costs, vectors).argmin(1)]
        found.append(vectors)
    return torch.stack(found)


def _distances(points: Tensor, costs: Tensor, vectors: Tensor) -> Tensor:
    """Weighted squares of the distances, less what all of a point have in common: `(points, vectors)`."""
    return costs @ vectors.square().T - 2 * (costs * points) @ vectors.T


def k_means(points: Tensor, costs: Tensor, entries: int, seed: int) -> Tensor:
    """
    Vectors of small weighted squared error to points (Lloyd's rounds; one that nothing is nearest to takes the place of what
    is worst off).

    Args:
        points (`Tensor`): float32 `(points, length)`.
        costs (`Tensor`): float32 `(points, length)`: of a squared error there.
        entries (`int`): vectors.
        seed (`int`): of those that are begun with.

    Returns:
        `Tensor`: float32 `(entries, length)`.
    """
    generator = torch.Generator().manual_seed(seed)
    begun = torch.multinomial(torch.ones(len(points)), entries, len(points) < entries, generator=generator)
    vectors, weighted = points[begun].clone(), costs * points
    own = (weighted * points).sum(1)
    for _ in range(ROUNDS_OF_MEANS):
        nearest, codes = _distances(points, costs, vectors).min(1)
        sums = torch.zeros_like(vectors).index_add_(0, codes, weighted)
        totals = torch.zeros_like(vectors).index_add_(0, codes, costs)
        used = torch.bincount(codes, minlength=entries) > 0
        vectors[used] = sums[used] / totals[used].clamp(min=1e-30)
        if not used.all():
            worst = (own + nearest).topk(min(int((~used).sum()), len(points))).indices
            vectors[(~used).nonzero().flatten()[: len(worst)]] = points[worst]
    return vectors


def sweep(
    target: Tensor, scales: Tensor, vectors: Tensor, inputs: Inputs, keep: Tensor | None = None, beam: int = BEAM
) -> Tensor:
    """
    The numbers of the vectors: uint8 `(out_features, in_features / length, tables)`.

    Args:
        target (`Tensor`): float32 `(out_features, in_features)`.
        scales (`Tensor`): float32 `(out_features,)`.
        vectors (`Tensor`): float32 `(tables, entries, length)`.
        inputs (`Inputs`): of the linear.
        keep (`Tensor`, *optional*): bool like the target: the others get vector 0.
        beam (`int`, *optional*, defaults to 4): sums that are followed from table to table.
    """
    rows, columns = target.shape
    tables, _, length = vectors.shape
    feedback = inputs.feedback
    errors = torch.zeros_like(target)
    codes = torch.empty(rows, columns // length, tables, dtype=torch.uint8)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        before = errors[:, :start] @ feedback[:start, start:stop]
        for first in range(start, stop, length):
            part = slice(first, first + length)
            fed = before[:, first - start : first - start + length]
            if first > start:
                fed = fed + errors[:, start:first] @ feedback[start:first, part]
            unit = feedback[part, part] + torch.eye(length)
            wanted = target[:, part] + torch.linalg.solve_triangular(unit, fed, upper=True, left=False)
            root = unit * inputs.importance[part].sqrt()
            chosen = nearest_sums((wanted / scales[:, None]) @ root, vectors @ root, beam)
            if keep is not None:
                chosen = chosen * keep[:, part]
            codes[:, first // length] = chosen.to(torch.uint8)
            errors[:, part] = target[:, part] - summed(vectors, chosen) * scales[:, None]
    return codes


def nearest_sums(points: Tensor, vectors: Tensor, beam: int) -> Tensor:
    """
    The numbers of vectors, one of each table, whose sum is near: exact for one table, with a beam for more.

    Args:
        points (`Tensor`): float32 `(points, length)`.
        vectors (`Tensor`): float32 `(tables, entries, length)`.
        beam (`int`): sums that are followed from table to table.

    Returns:
        `Tensor`: int64 `(points, tables)`.
    """
    squares = vectors.square().sum(2)
    costs = torch.addmm(squares[0], points, vectors[0].T, alpha=-2)
    if len(vectors) == 1:
        return costs.argmin(1, keepdim=True)
    entries = vectors.shape[1]
    found, path = costs.topk(min(beam, entries), 1, largest=False)
    path = path[..., None]
    for table in range(1, len(vectors)):
        left = points[:, None] - summed(vectors[:table], path)
        costs = found[..., None] + squares[table] - 2 * left @ vectors[table].T
        kept = 1 if table == len(vectors) - 1 else min(beam, costs.shape[1] * entries)
        found, best = costs.flatten(1).topk(kept, 1, largest=False)
        earlier = path.gather(1, (best // entries)[..., None].expand(-1, -1, table))
        path = torch.cat([earlier, (best % entries)[..., None]], 2)
    return path[:, 0]


def refitted(target: Tensor, found: Vectors, gram: Tensor, sparse: bool = False) -> Tensor:
    """
    The vectors that are better for the numbers: a few steps of conjugate gradients from those at hand. Where it is
    `sparse`, the first stays zero.
    """
    tables, entries, length = found.vectors.shape
    codes = (found.codes.int() + entries * torch.arange(tables, dtype=torch.int32)).view(-1, tables)

    def gathered(each: Tensor) -> Tensor:
        """Sums over all places of a vector, of what belongs to each weight."""
        parts = (each * found.scales[:, None]).view(-1, length)
        total = torch.zeros(tables * entries, length)
        for table in range(tables):
            total.index_add_(0, codes[:, table], parts)
        if sparse:
            total[0] = 0
        return total.view_as(found.vectors)

    def curved(vectors: Tensor) -> Tensor:
        return gathered(replace(found, vectors=vectors).values() @ gram)

    diagonal = gathered(found.scales[:, None] * gram.diagonal())
    diagonal.clamp_(min=1e-6 * diagonal.mean().item() + 1e-30)
    residual = gathered((target - found.values()) @ gram)
    step, moved = torch.zeros_like(residual), residual / diagonal
    direction, norm = moved.clone(), (residual * moved).sum()
    for _ in range(CG_STEPS):
        bent = curved(direction)
        along = (direction * bent).sum()
        if not along > 0:
            break
        step += norm / along * direction
        residual -= norm / along * bent
        moved = residual / diagonal
        norm, last = (residual * moved).sum(), norm
        direction = moved + norm / last * direction
    return found.vectors + step
