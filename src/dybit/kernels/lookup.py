"""Codebooks as tables for plain torch: exact rounding to the nearest level."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dybit.formats.codebook import Codebook

_TABLE_LIMIT = 1 << 17


class Lookup:
    """A codebook as torch tensors, with exact rounding to the nearest level for FP32 inputs.

    If all midpoints are multiples of one power of two (in every DyBit, integer and minifloat format), one table look-up
    finds a level instead of a binary search. This is several times faster and gives the same result.

    Args:
        book: The codebook.
        device: Where the tensors live.

    Attributes:
        levels: The values in increasing order, float32 of shape (levels,).
        codes: The code of every level, uint8 of shape (levels,).
    """

    def __init__(self, book: Codebook, device: torch.device) -> None:
        self.levels = torch.tensor(book.levels, dtype=torch.float32, device=device)
        self.codes = torch.tensor(book.level_codes, dtype=torch.uint8, device=device)
        self._boundaries = torch.tensor(book.boundaries(np.float32), dtype=torch.float32, device=device)
        self._unit, self._limit = grid(book.midpoints)
        if self._unit:
            # Entry 2k is the point k·unit, entry 2k+1 the open interval above it.
            points = np.arange(-2 * self._limit, 2 * self._limit + 1) * (self._unit / 2)
            table = np.searchsorted(book.midpoints, points, side="left")
            on = np.minimum(table, len(book.midpoints) - 1)
            table += (book.midpoints[on] == points) & book.ties_up[on] & (table == on)
            self._table = torch.tensor(table, dtype=torch.int32, device=device)

    def nearest(self, x: Tensor) -> Tensor:
        """Returns the index of the level nearest to each element.

        Args:
            x: float32 of any shape, without NaN; infinities saturate.

        Returns:
            int32 of the shape of ``x``.
        """
        if not self._unit:
            return torch.bucketize(x.contiguous(), self._boundaries, out_int32=True)
        position = (x * (1.0 / self._unit)).clamp_(-self._limit, self._limit)
        index = position.floor().add_(position.ceil_()).add_(2 * self._limit).to(torch.int32)
        return self._table.index_select(0, index.reshape(-1)).view(x.shape)

    def round(self, x: Tensor) -> Tensor:
        """Returns the nearest value of each element: float32 of the shape of ``x`` (float32, without NaN)."""
        return self.levels.index_select(0, self.nearest(x).view(-1)).view(x.shape)

    def encode(self, x: Tensor) -> Tensor:
        """Returns the nearest code of each element: uint8 of the shape of ``x`` (float32, without NaN)."""
        return self.codes.index_select(0, self.nearest(x).view(-1)).view(x.shape)


def grid(midpoints: NDArray[np.float64]) -> tuple[float, int]:
    """Returns the power of two that divides every midpoint, and the steps that cover all; (0, 0) if none."""
    for exponent in range(4, -17, -1):
        unit = 2.0**exponent
        steps = midpoints / unit
        if np.array_equal(steps, np.round(steps)):
            limit = int(np.abs(steps).max()) + 1
            return (unit, limit) if 4 * limit <= _TABLE_LIMIT else (0.0, 0)
    return 0.0, 0


@lru_cache(maxsize=1024)
def lookup(book: Codebook, device: torch.device) -> Lookup:
    """Returns the cached :class:`Lookup` of a codebook on a device."""
    return Lookup(book, device)


class ChosenLookup:
    """Several codebooks as one table, to round units with different codebooks at once.

    Args:
        books: The codebooks.
        device: Where the tensors live.
    """

    def __init__(self, books: tuple[Codebook, ...], device: torch.device) -> None:
        self._books = books
        self._unit, self._limit = grid(np.concatenate([book.midpoints for book in books]))
        if self._unit:
            # Entry 2k is the point k · unit, entry 2k+1 the open interval above it, in which no midpoint lies.
            steps = torch.arange(-2 * self._limit, 2 * self._limit + 1, dtype=torch.float32, device=device)
            points = steps * (self._unit / 2)
            self._size = len(points)
            self._values = torch.cat([lookup(book, device).round(points) for book in books])

    def round(self, x: Tensor, choice: Tensor) -> Tensor:
        """Returns the nearest level of each element.

        Args:
            x: float32 of shape (units, length), without NaN.
            choice: The codebook of every unit, integers of shape (units, 1).
        """
        if self._unit:
            position = (x * (1.0 / self._unit)).clamp_(-self._limit, self._limit)
            index = position.floor().add_(position.ceil_()).add_(2 * self._limit).to(torch.int32)
            index += choice.to(torch.int32) * self._size
            return self._values.index_select(0, index.reshape(-1)).view(x.shape)
        result = torch.empty_like(x)
        for place, book in enumerate(self._books):
            rows = (choice == place).view(-1).nonzero().view(-1)
            if len(rows):
                result[rows] = lookup(book, x.device).round(x[rows])
        return result


@lru_cache(maxsize=256)
def chosen_lookup(books: tuple[Codebook, ...], device: torch.device) -> ChosenLookup:
    """Returns the cached :class:`ChosenLookup` of some codebooks on a device."""
    return ChosenLookup(books, device)


@lru_cache(maxsize=256)
def level_ends(books: tuple[Codebook, ...], device: torch.device) -> Tensor:
    """Returns the lowest and highest level of every codebook: float32 of shape (books, 2)."""
    ends = np.array([(book.levels[0], book.levels[-1]) for book in books])
    return torch.tensor(ends, dtype=torch.float32, device=device)
