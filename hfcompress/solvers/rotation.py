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
Orthogonal matrices that spread a few large entries over all of them, kept as Kronecker factors: a rotation of width n
costs far less than a product with an n x n matrix.

A Hadamard matrix of order n has entries +-1 and H H^T = n I. Sylvester (1867) makes the orders 2^k, Paley (1933) the
orders q + 1 for a prime q = 3 mod 4 and 2 (q + 1) for a prime q = 1 mod 4, and Kronecker products the rest: 12, 20, 28
times 2^k and so on. Rotating weights so that they quantize better: QuIP# (arXiv 2402.04396), QuaRot (arXiv 2404.00456),
SpinQuant (arXiv 2405.16406).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


LARGEST_SYLVESTER = 64  # the order of one factor: two products of 64 are cheaper than one of 4096
LARGEST_PALEY = 256


@dataclass(frozen=True)
class Rotation:
    """
    The orthogonal matrix `R = diag(signs) (F_1 x F_2 x ...)`, a Kronecker product of small orthogonal factors.

    Args:
        signs (`Tensor`): float64 `(size,)`, +-1.
        factors (`tuple[Tensor, ...]`): float64 square matrices whose orders multiply to `size`.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """The width of what it rotates."""
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """`x R` for `x` of shape `(..., size)`, in float64."""
        shape = x.shape
        x = x.double() * self.signs.to(x.device)
        before, after = 1, self.size
        for factor in self.factors:
            order = len(factor)
            after //= order
            x = x.reshape(-1, before, order, after)
            x = torch.einsum("nboa,op->nbpa", x, factor.to(x.device))
            before *= order
        return x.reshape(shape)

    def matrix(self) -> Tensor:
        """The whole matrix: float64 `(size, size)`."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


def random_rotation(size: int, seed: int) -> Rotation:
    """
    A randomized Hadamard matrix over `sqrt(size)`; where no Hadamard matrix of that order is known here, a Hadamard
    matrix of the largest power of two that divides it times a random orthogonal one.

    Args:
        size (`int`): the width of what is rotated.
        seed (`int`): of the signs and of the random part.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    odd, power = size, 1
    while odd % 2 == 0:
        odd, power = odd // 2, power * 2
    factors = []
    if odd > 1:
        # the smallest order with this odd part that Paley's constructions give
        order = next((odd * p for p in (4, 8, 16, 32) if power % p == 0 and paley(odd * p) is not None), None)
        if order is None:
            factors.append(_random_orthogonal(odd, generator))
        else:
            base = paley(order)
            assert base is not None
            factors.append(base / order**0.5)
            power //= order // odd
    while power > 1:
        order = min(power, LARGEST_SYLVESTER)
        factors.append(sylvester(order) / order**0.5)
        power //= order
    return Rotation(signs, tuple(factors))


@cache
def sylvester(order: int) -> Tensor:
    """The Hadamard matrix of an order that is a power of two: float64, entries +-1."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = sylvester(order // 2)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


@cache
def paley(order: int) -> Tensor | None:
    """
    A Hadamard matrix by one of Paley's two constructions, of prime fields only.

    Args:
        order (`int`): a multiple of 4.

    Returns:
        `Tensor` or `None`: float64 `(order, order)`, entries +-1; `None` where neither construction gives this order.
    """
    if order > LARGEST_PALEY or order % 4:
        return None
    first, second = order - 1, order // 2 - 1
    if _is_prime(first):  # first = 3 mod 4, so the core is skew: H = I + [[0, 1], [-1, Q]]
        core = torch.zeros(order, order, dtype=torch.float64)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1, -1, _jacobsthal(first)
        return core + torch.eye(order, dtype=torch.float64)
    if second % 4 == 1 and _is_prime(second):  # the core is symmetric, and its zero diagonal takes a block of its own
        core = torch.zeros(second + 1, second + 1, dtype=torch.float64)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1, _jacobsthal(second)
        off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, off) + torch.kron(torch.eye(second + 1, dtype=torch.float64), diagonal)
    return None


def _jacobsthal(q: int) -> Tensor:
    """`Q[i, j]` is 1 where `i - j` is a nonzero square modulo the prime `q`, -1 where it is none, 0 on the diagonal."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[[x * x % q for x in range(1, q)]] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # uniform over the orthogonal matrices (Mezzadri, math-ph/0609050)
