"""The first step of the search for scales: judges about 700 pairs of codebook and scale at once, by one table.

Elements are sorted into the cells of a fine grid; within a cell, the squared error of a pair is taken as constant. The
errors of all pairs are then sums of rows of a precomputed table. The kernels multiply the table by a unit's histogram;
plain torch sums its rows by ``embedding_bag`` (:mod:`dybit.kernels.scale_errors`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dybit.formats.codebook import Codebook
from dybit.kernels.rounding import fake_quantize
from dybit.kernels.scale_errors import Chunks, CoarseTable

_CELLS = 512  # cells of the grid on each side of zero, spaced quadratically: finest near zero
_SCALE_STEP = 1.035  # ratio of neighbouring scales
_LOWEST_SCALE = 0.04  # the smallest scale, relative to the one that clips nothing
# In short units with many levels the error is a jagged function of the scale, so the neighbourhoods of the two best
# scales are searched finely.
_MANY_LEVELS, _SHORT = 32, 256
_FINE_FACTORS = tuple(1.07 ** (i / 7) for i in range(-7, 8))


def coarse_starts(books: tuple[Codebook, ...], chunks: Chunks, pooled: bool) -> list[Tensor]:
    """Returns the scales of every codebook at which the finer search starts.

    Args:
        books: The codebooks.
        chunks: Elements of magnitude 1 at most, float32. Every segment is a unit, or all segments are one unit.
        pooled: Whether all segments of all chunks are one unit.

    Returns:
        For every codebook, float32 of shape (units, starts).
    """
    device, length = chunks[0][0].device, chunks[0][0].shape[1]
    table, scales = coarse_table(books, device)
    short = not pooled and length <= _SHORT
    chosen = scales[table.search(chunks, pooled, 2 if short else 1).long()].unbind(1)
    factors = scales.new_tensor(_FINE_FACTORS)
    return [
        (start[:, :, None] * factors).flatten(1) if short and len(book.levels) > _MANY_LEVELS else start[:, :1]
        for book, start in zip(books, chosen, strict=True)
    ]


@lru_cache(maxsize=64)
def coarse_table(books: tuple[Codebook, ...], device: torch.device) -> tuple[CoarseTable, Tensor]:
    """Returns the mean squared errors by cell and by pair of codebook and scale, and the scale of every pair.

    Args:
        books: The codebooks.
        device: Of the table.
    """
    edge = torch.arange(2 * _CELLS, dtype=torch.float64, device="cpu") - _CELLS
    inside = (edge[:, None] + (edge.new_tensor(range(6)) + 0.5) / 6) / _CELLS
    x = (inside.sign() * inside**2).float().to(device)
    columns: list[Tensor] = []
    scales: list[float] = []
    owners = []
    for book in books:
        first = len(scales)
        scales += _coarse_scales(book)
        owners.append((first, len(scales)))
        tried = x.new_tensor(scales[first:])[:, None, None]
        many = x.expand(len(tried), *x.shape)
        columns.append((x - fake_quantize(many, tried, None, book)).square_().mean(2).T)
    return CoarseTable(torch.cat(columns, dim=1), owners), x.new_tensor(scales)


def _coarse_scales(book: Codebook) -> list[float]:
    """Returns the scales to try for data whose largest magnitude is 1."""
    scales = [1 / reach for reach in reaches(book, _LOWEST_SCALE)]
    return scales + [-scale for scale in scales] if scale_has_sign(book) else scales


def scale_has_sign(book: Codebook) -> bool:
    """Whether a scale may be negative: some levels are negative, and the levels are not symmetric."""
    return not book.symmetric and bool(book.levels[0] < 0)


def reaches(book: Codebook, lowest_scale: float) -> list[float]:
    """Returns values to which the largest magnitude may be scaled, finely spaced, starting with the largest level.

    They end at the median of the levels' magnitudes, since tapered formats have their resolution at small values: at
    8 bits, full DyBit is best used up to about a twentieth of its largest value. If less than half of the levels are in
    use, a format of fewer bits is better.

    Args:
        book: The codebook.
        lowest_scale: The smallest scale, relative to the one that clips nothing.
    """
    magnitudes = np.unique(np.abs(book.levels))
    top, middle = float(magnitudes[-1]), float(magnitudes[len(magnitudes) // 2])
    count = math.ceil(math.log(top / lowest_scale / middle) / math.log(_SCALE_STEP))
    return [top, *(middle * _SCALE_STEP**i for i in range(count + 1))]
