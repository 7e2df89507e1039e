"""The first step of the search for scales: some 700 pairs of codebook and scale at once, by one table.

The squared error of a pair depends on an element only through the cell of a fine grid in which the element lies. So the
errors of all pairs are sums of rows of a table made in advance. The kernels multiply the table by a unit's histogram;
plain torch sums its rows by ``embedding_bag``. They add up in different orders, so that they may choose differently
between two scales that are as good as equal. The kernels of all instruction sets choose alike.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dybit.formats.codebook import Codebook
from dybit.kernels import codes, extension
from dybit.kernels.code_operators import lookup
from dybit.kernels.extension import FALLBACK

Chunks = list[tuple[Tensor, Tensor | None]]  # elements (segments, length), and the importance of each or None

_CELLS = 512  # cells of the grid on either side of zero, spaced as squares: finest near zero
_SCALE_STEP = 1.035  # ratio of neighbouring scales
_LOWEST_SCALE = 0.04  # the smallest scale, as a share of the one that clips nothing
# In short units of many levels the error is a jagged function of the scale: the neighbourhoods of the two best scales
# are looked at closely.
_MANY_LEVELS, _SHORT = 32, 256
_FINE_FACTORS = tuple(1.07 ** (i / 7) for i in range(-7, 8))


def coarse_starts(books: tuple[Codebook, ...], chunks: Chunks, pooled: bool) -> list[Tensor]:
    """Returns the scales of every codebook from which a finer search should start.

    Args:
        books: The codebooks.
        chunks: Elements of magnitude 1 at most, float32. Every segment is a unit, or all together are one.
        pooled: Whether all segments of all chunks are one unit.

    Returns:
        For every codebook, float32 of shape (units, starts).
    """
    device, length = chunks[0][0].device, chunks[0][0].shape[1]
    table, scales, owners, compiled = coarse_table(books, device, extension.isa() != FALLBACK)
    short = not pooled and length <= _SHORT
    best = 2 if short else 1
    if compiled is not None:
        pairs = compiled.search_all(chunks, best) if pooled else compiled.search(*chunks[0], best)
        chosen = list(scales[pairs.long()].unbind(1))
    else:
        errors = torch.stack([coarse_errors(x, h, table, pooled) for x, h in chunks]).sum(0)
        chosen = [
            scales[first:last][errors[:, first:last].topk(min(best, last - first), dim=1, largest=False).indices]
            for first, last in owners
        ]
    factors = scales.new_tensor(_FINE_FACTORS)
    return [
        (start[:, :, None] * factors).flatten(1) if short and len(book.levels) > _MANY_LEVELS else start[:, :1]
        for book, start in zip(books, chosen, strict=True)
    ]


def coarse_errors(x: Tensor, h: Tensor | None, table: Tensor, pooled: bool) -> Tensor:
    """Returns the errors of all pairs in plain torch: (units, pairs), or (1, pairs) where all is one unit.

    Args:
        x: Elements of magnitude 1 at most, of shape (units, length).
        h: Their importance, of the same shape, or None.
        table: As :func:`coarse_table` returns it.
        pooled: Whether all is one unit.
    """
    cell = (x.sign() * x.abs().sqrt_()).mul_(_CELLS).floor_().add_(_CELLS).clamp_(0, 2 * _CELLS - 1)
    sums = torch.nn.functional.embedding_bag(cell.to(torch.int32), table, mode="sum", per_sample_weights=h)
    return sums.sum(0, keepdim=True, dtype=torch.float64) if pooled else sums


@lru_cache(maxsize=64)
def coarse_table(
    books: tuple[Codebook, ...], device: torch.device, compiled: bool
) -> tuple[Tensor, Tensor, list[tuple[int, int]], codes.Coarse | None]:
    """Returns the mean squared error by cell and by pair of codebook and scale.

    Args:
        books: The codebooks.
        device: Where the table lives.
        compiled: Whether to make the table for the kernels, too.

    Returns:
        The table, float32 of shape (2 · cells, pairs); the scale of every pair; the range of pairs of every codebook;
        and the table for the kernels, or None.
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
        rounded = codes.fake_quantize(many, tried, None, book)
        if rounded is None:
            rounded = lookup(book, device).round(many / tried) * tried
        columns.append((x - rounded).square_().mean(2).T)
    whole = torch.cat(columns, dim=1).contiguous()
    return whole, x.new_tensor(scales), owners, codes.coarse(whole, owners) if compiled else None


def _coarse_scales(book: Codebook) -> list[float]:
    """Scales to try for data whose largest magnitude is 1."""
    scales = [1 / reach for reach in reaches(book, _LOWEST_SCALE)]
    return scales + [-scale for scale in scales] if scale_has_sign(book) else scales


def scale_has_sign(book: Codebook) -> bool:
    """Whether a scale may be negative: the levels differ with the sign reversed, and some are below zero."""
    return not book.symmetric and bool(book.levels[0] < 0)


def reaches(book: Codebook, lowest_scale: float) -> list[float]:
    """Returns values that the largest magnitude may be scaled to, finely spaced, first the largest level.

    They end at the middle one of the levels' magnitudes: a tapered format has its resolution down there, and at 8 bits
    full DyBit is best used up to about a twentieth of its largest value. With less than half of the levels in use, a
    format is better replaced by one of fewer bits.

    Args:
        book: The codebook.
        lowest_scale: The smallest scale, as a share of the one that clips nothing.
    """
    magnitudes = np.unique(np.abs(book.levels))
    top, middle = float(magnitudes[-1]), float(magnitudes[len(magnitudes) // 2])
    count = math.ceil(math.log(top / lowest_scale / middle) / math.log(_SCALE_STEP))
    return [top, *(middle * _SCALE_STEP**i for i in range(count + 1))]
