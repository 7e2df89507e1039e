"""Rotations by Hadamard matrices: their construction, and the fast product with them.

A rotation of n = m · 2^k elements is R = (M ⊗ H) · diag(s): signs s, the Walsh-Hadamard matrix H of 2^k / √2^k, applied
in k steps of additions, and a small orthogonal matrix M of order m. M is a Hadamard matrix, which mixes all elements
equally, if Paley's constructions give one; else a random orthogonal matrix.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from dybit.errors import DyBitError

_LARGEST_FACTOR = 512  # of the dense part: a larger one would cost as much as the layer


def hadamard(order: int) -> Tensor | None:
    """Returns a Hadamard matrix, of ±1 and with orthogonal rows.

    Sylvester's doubling of Paley's two constructions (R. Paley, "On orthogonal matrices", 1933) for primes.

    Args:
        order: Number of rows.

    Returns:
        float32 of shape (order, order), or None if these constructions give none.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float32, device="cpu")
    if order == 2:
        return _matrix([[1, 1], [1, -1]])
    if order % 4:
        return None
    if _is_prime(order - 1):  # order - 1 = 3 mod 4
        core = _jacobsthal(order - 1)
        skew = core.new_zeros(order, order)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
        skew.diagonal().add_(1)
        return skew
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):  # half - 1 = 1 mod 4
        core = _jacobsthal(half - 1)
        conference = core.new_zeros(half, half)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, core
        eye = torch.ones_like(conference[0]).diag()
        return torch.kron(conference, _matrix([[1, 1], [1, -1]])) + torch.kron(eye, _matrix([[1, -1], [-1, -1]]))
    smaller = hadamard(half)
    return None if smaller is None else torch.kron(_matrix([[1, 1], [1, -1]]), smaller)


def orthogonal_factor(size: int, generator: torch.Generator) -> Tensor:
    """Returns the matrix M of a rotation of ``size`` elements, with ``size`` a power of two times its order.

    Args:
        size: Elements.
        generator: Draws the matrix if no Hadamard matrix is known.

    Returns:
        float32 orthogonal of shape (m, m); (1, 1) for powers of two.

    Raises:
        DyBitError: The odd part of ``size`` is above 512 and no Hadamard matrix is known.
    """
    odd = size // (size & -size)
    order = odd
    while size % order == 0 and order <= max(4 * odd, _LARGEST_FACTOR):
        matrix = hadamard(order)
        if matrix is not None and order <= _LARGEST_FACTOR:
            return matrix / math.sqrt(order)
        order *= 2
    if odd > _LARGEST_FACTOR:
        raise DyBitError(f"size={size} has no rotation: its odd part {odd} is above {_LARGEST_FACTOR}")
    q, r = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64, device="cpu"))
    return cast(Tensor, q * r.diagonal().sign()).float().contiguous()


def walsh(x: Tensor) -> Tensor:
    """Multiplies the last dimension by the Walsh-Hadamard matrix over the root of its size: orthogonal and symmetric.

    Args:
        x: Floating point of shape (..., 2^k).

    Returns:
        The same shape and type.
    """
    size = x.shape[-1]
    y, half = x.reshape(-1, size), 1
    while half < size:
        pairs = y.view(-1, size // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((first + second, first - second), dim=2).view(-1, size)
        half *= 2
    return cast(Tensor, y * size**-0.5).view(x.shape)


def rotate(x: Tensor, factor: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    """Rotates the last dimension: R·x, or Rᵀ·x; see the module's docstring.

    Args:
        x: Floating point of shape (..., n). Computed in float32, or in the type of ``x`` if that is wider.
        factor: M, of shape (m, m), n being m times a power of two.
        signs: s, of shape (n,).
        inverse: Whether to undo the rotation.

    Returns:
        The shape and type of ``x``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    factor, signs, y = factor.to(wide), signs.to(wide), x.to(wide)
    if not inverse:
        y = y * signs
    parts = walsh(y.unflatten(-1, (factor.shape[0], -1)))
    if factor.shape[0] > 1:
        parts = (factor.t() if inverse else factor) @ parts
    y = parts.flatten(-2)
    return (y * signs if inverse else y).to(x.dtype)


def _matrix(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _jacobsthal(prime: int) -> Tensor:
    """Returns the matrix of quadratic characters of i - j modulo a prime."""
    squares = {i * i % prime for i in range(1, prime)}
    character = _matrix([[0] + [1 if i in squares else -1 for i in range(1, prime)]])[0]
    index = torch.arange(prime, dtype=torch.int64, device="cpu")
    return character[(index[:, None] - index) % prime]
