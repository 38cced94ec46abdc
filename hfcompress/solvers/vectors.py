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
Vector quantization: neighbours in a row are rounded together to the nearest of a few vectors that the whole weight shares.

Rows are scaled to a root mean square of one. The vectors begin as weighted k-means of the weight's own (LBG; Linde, Buzo
and Gray 1980; weighted by what errors cost: VPTQ, arXiv 2409.17066). Then errors are fed back as in GPTQ, vector after
vector: with `H = U D U^T` and `T` the unit upper triangular part of `U` among the columns of one vector, what is rounded
there is `y = w + f T^-1`, `f` being the feedback of all columns before, and an error costs `|(y - q) T D^(1/2)|^2` (block
LDLQ: QuIP#, arXiv 2402.04396). With the numbers held, `tr((V - Q) H (V - Q)^T)` is quadratic in the vectors, which are
improved by conjugate gradients; both in turn, and what is best stays.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.solvers.gptq import BLOCK, Factor


ENTRIES = 256
ENOUGH = 1 << 16  # weights from which the vectors are told that are begun with
ROUNDS_OF_MEANS = 20
CG_STEPS = 12


@dataclass(frozen=True)
class Vectors:
    """
    A weight of vectors.

    Args:
        codes (`Tensor`): uint8 `(out_features, in_features / length)`.
        scales (`Tensor`): float32 `(out_features,)`.
        vectors (`Tensor`): float32 `(256, length)`.
    """

    codes: Tensor
    scales: Tensor
    vectors: Tensor

    def values(self) -> Tensor:
        """float32 `(out_features, in_features)`."""
        return self.vectors[self.codes.int()].flatten(1) * self.scales[:, None]


def gptq_vectors(
    target: Tensor, gram: Tensor, factor: Factor, length: int, dtype: torch.dtype, rounds: int = 2, seed: int = 0
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
    """
    device, target = target.device, target.cpu()
    damped, importance, feedback = factor.damped(gram).cpu(), factor.importance.cpu(), factor.feedback.cpu()
    scales = _stored(target.square().mean(1).sqrt().clamp(min=torch.finfo(dtype).tiny), dtype)
    vectors = _stored(k_means(target / scales[:, None], importance, length, seed), dtype)
    best = now = Vectors(sweep(target, scales, vectors, feedback, importance), scales, vectors)
    least = loss(target, best, damped)
    for _ in range(rounds):
        vectors = _stored(refitted(target, now, damped), dtype)
        now = Vectors(sweep(target, scales, vectors, feedback, importance), scales, vectors)
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


def k_means(weight: Tensor, importance: Tensor, length: int, seed: int) -> Tensor:
    """
    Vectors of small weighted squared error to those of a weight (Lloyd's rounds; one that nothing is nearest to takes the
    place of what is worst off).

    Args:
        weight (`Tensor`): float32 `(out_features, in_features)`.
        importance (`Tensor`): float32 `(in_features,)`: what a squared error in each column costs.
        length (`int`): of a vector.
        seed (`int`): of those that are begun with.

    Returns:
        `Tensor`: float32 `(256, length)`.
    """
    points = weight.view(-1, length)
    costs = importance.view(-1, length).repeat(len(weight), 1) / importance.mean()
    generator = torch.Generator().manual_seed(seed)
    if points.numel() > ENOUGH:
        chosen = torch.randperm(len(points), generator=generator)[: ENOUGH // length]
        points, costs = points[chosen], costs[chosen]
    begun = torch.multinomial(torch.ones(len(points)), ENTRIES, len(points) < ENTRIES, generator=generator)
    vectors, weighted = points[begun].clone(), costs * points
    own = (weighted * points).sum(1)
    for _ in range(ROUNDS_OF_MEANS):
        distances = costs @ vectors.square().T - 2 * weighted @ vectors.T
        nearest, codes = distances.min(1)
        sums = torch.zeros_like(vectors).index_add_(0, codes, weighted)
        totals = torch.zeros_like(vectors).index_add_(0, codes, costs)
        used = torch.bincount(codes, minlength=ENTRIES) > 0
        vectors[used] = sums[used] / totals[used].clamp(min=1e-30)
        if not used.all():
            vectors[~used] = points[(own + nearest).topk(int((~used).sum())).indices]
    return vectors


def sweep(target: Tensor, scales: Tensor, vectors: Tensor, feedback: Tensor, importance: Tensor) -> Tensor:
    """
    The numbers of the vectors: uint8 `(out_features, in_features / length)`.

    Args:
        target (`Tensor`): float32 `(out_features, in_features)`.
        scales (`Tensor`): float32 `(out_features,)`.
        vectors (`Tensor`): float32 `(256, length)`.
        feedback (`Tensor`): strictly upper triangular part of `U`, float32 `(in_features, in_features)`.
        importance (`Tensor`): `D`, float32 `(in_features,)`.
    """
    rows, columns = target.shape
    length = vectors.shape[1]
    errors = torch.zeros_like(target)
    codes = torch.empty(rows, columns // length, dtype=torch.uint8)
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
            root = unit * importance[part].sqrt()
            near, far = (wanted / scales[:, None]) @ root, vectors @ root
            chosen = torch.addmm(far.square().sum(1), near, far.T, alpha=-2).argmin(1)
            codes[:, first // length] = chosen.to(torch.uint8)
            errors[:, part] = target[:, part] - vectors[chosen] * scales[:, None]
    return codes


def refitted(target: Tensor, found: Vectors, gram: Tensor) -> Tensor:
    """The vectors that are better for the numbers: a few steps of conjugate gradients from those at hand."""
    codes, length = found.codes.flatten().int(), found.vectors.shape[1]

    def gathered(each: Tensor) -> Tensor:
        """Sums over all places of a vector, of what belongs to each weight."""
        parts = (each * found.scales[:, None]).view(-1, length)
        return torch.zeros(ENTRIES, length).index_add_(0, codes, parts)

    def curved(vectors: Tensor) -> Tensor:
        return gathered(Vectors(found.codes, found.scales, vectors).values() @ gram)

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
