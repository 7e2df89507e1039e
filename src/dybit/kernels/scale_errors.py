"""Sums of errors for the search for scales, by the compiled kernels or in plain torch.

The two add in different orders, so a search may choose differently between two nearly equal scales. The kernels of all
instruction sets give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats.codebook import Codebook
from dybit.kernels.arguments import address, compiled_codebook, kernels_for, per_unit
from dybit.kernels.lookup import lookup

Chunks = Sequence[tuple[Tensor, Tensor | None]]  # elements (segments, length), and their importance or None

_F32, _F64, _I32 = torch.float32, torch.float64, torch.int32


def fit(book: Codebook, x: Tensor, weights: Tensor | None, scale: Tensor) -> Tensor:
    """Returns weighted sums over every row at its scale: of the squared error, of value · x and of value².

    Args:
        book: The codebook.
        x: float32 of shape (units, length).
        weights: As ``x``, or None for ones.
        scale: float32 of shape (units or 1, 1).

    Returns:
        float64 of shape (3, units).

    Raises:
        DyBitError: A tensor has another type or shape.
    """
    compiled = kernels_for(x, weights, scale)
    if compiled is None:
        value = lookup(book, x.device).round(x / scale)
        residual = torch.addcmul(x, value, scale, value=-1)
        weighted = value if weights is None else value * weights
        error = residual if weights is None else residual * weights
        return torch.stack([(error * residual).sum(1), (weighted * x).sum(1), (weighted * value).sum(1)]).double()
    units, length = x.shape
    x, scale = x.contiguous(), scale.contiguous()
    weights = None if weights is None else weights.contiguous()
    out = torch.empty(units, 3, dtype=_F64, device="cpu")
    compiled_codebook(book).fit(
        (units, length, length),
        address("x", x, _F32, (units, length)),
        address("weights", weights, _F32, (units, length)),
        per_unit("scale", scale, _F32, units, 1),
        address("out", out, _F64, (units, 3)),
        torch.get_num_threads(),
    )
    return out.T


class CoarseTable:
    """Errors by cell of a grid and by pair of codebook and scale, to judge all pairs at once.

    Args:
        table: float32 of shape (cells, pairs). The first half of the cells is for negative elements. Bounds of cells
            are spaced quadratically.
        owners: The range of pairs of every codebook.

    Raises:
        DyBitError: ``table`` has no rows, or an odd number of them.
    """

    def __init__(self, table: Tensor, owners: Sequence[tuple[int, int]]) -> None:
        if table.ndim != 2 or table.shape[0] < 2 or table.shape[0] % 2:
            raise DyBitError(f"table must have an even number of rows, a cell each, but has shape {tuple(table.shape)}")
        self.table, self.owners = table.contiguous(), tuple(owners)
        self._half = table.shape[0] // 2

    @cached_property
    def _compiled(self) -> Any:  # noqa: ANN401
        """The extension's own object."""
        starts = [start for start, _ in self.owners] + [self.owners[-1][1]]
        first = torch.tensor(starts, dtype=_I32, device="cpu")
        return kernels_for().CoarseTable(
            address("table", self.table, _F32, (2 * self._half, starts[-1])),
            self._half,
            starts[-1],
            address("first", first, _I32, (len(starts),)),
            len(self.owners),
        )

    def search(self, chunks: Chunks, pooled: bool, best: int) -> Tensor:
        """Finds the pairs with the least error for every codebook.

        Args:
            chunks: Elements of magnitude 1 at most, float32 of shape (segments, length), with their importance. Every
                segment of a single chunk is a unit, or all segments are one unit.
            pooled: Whether all segments of all chunks are one unit.
            best: How many pairs to return.

        Returns:
            Integers of shape (units, codebooks, best), the best first.

        Raises:
            DyBitError: A tensor has another type or shape.
        """
        if kernels_for(self.table, *(tensor for chunk in chunks for tensor in chunk)) is None:
            errors = torch.stack([self.errors(x, h, pooled) for x, h in chunks]).sum(0)
            found = [errors[:, a:b].topk(min(best, b - a), dim=1, largest=False).indices + a for a, b in self.owners]
            return torch.stack(found, dim=1)
        return self._search_all(chunks, best) if pooled else self._search(*chunks[0], best)

    def errors(self, x: Tensor, weights: Tensor | None, pooled: bool) -> Tensor:
        """Returns the errors of all pairs in plain torch: (units, pairs), or (1, pairs) for one unit."""
        cell = (x.sign() * x.abs().sqrt_()).mul_(self._half).floor_().add_(self._half).clamp_(0, 2 * self._half - 1)
        sums = torch.nn.functional.embedding_bag(cell.to(_I32), self.table, mode="sum", per_sample_weights=weights)
        return sums.sum(0, keepdim=True, dtype=_F64) if pooled else sums

    def _search(self, x: Tensor, weights: Tensor | None, best: int) -> Tensor:
        units, length = x.shape
        x, weights = x.contiguous(), None if weights is None else weights.contiguous()
        shape = (units, len(self.owners), best)
        out = torch.empty(shape, dtype=_I32, device="cpu")
        self._compiled.search(
            (units, length, length),
            address("x", x, _F32, (units, length)),
            address("weights", weights, _F32, (units, length)),
            best,
            address("out", out, _I32, shape),
            torch.get_num_threads(),
        )
        return out

    def _search_all(self, chunks: Chunks, best: int) -> Tensor:
        histogram = torch.zeros(2 * self._half, dtype=_F64, device="cpu")
        total = address("histogram", histogram, _F64, (2 * self._half,))
        for x, weights in chunks:
            x, weights = x.contiguous(), None if weights is None else weights.contiguous()
            given, importance = address("x", x, _F32, x.shape), address("weights", weights, _F32, x.shape)
            kernels_for().add_to_histogram(given, importance, x.numel(), self._half, total)
        shape = (1, len(self.owners), best)
        out = torch.empty(shape, dtype=_I32, device="cpu")
        self._compiled.search_histogram(total, best, address("out", out, _I32, shape))
        return out
