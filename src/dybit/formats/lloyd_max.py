"""Lloyd-Max: the codebook of least squared error for given samples, the bound for every format of fixed values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dybit.errors import DyBitError
from dybit.formats.codebook import Table
from dybit.formats.tables import check_integer


def lloyd_max(samples: ArrayLike, bits: int, iterations: int = 10_000, zero: bool = False) -> Table:
    """Fits a codebook to samples (Lloyd, 1982; Max, 1960).

    Alternates between cells (every sample to its nearest level) and levels (the mean of every cell). The samples are
    sorted once; a cell's mean then comes from prefix sums and an iteration costs 2^bits binary searches whatever the
    number of samples. There are two starts, and the better end is taken, so the result is deterministic. It is the
    optimum for log-concave distributions, and a local optimum otherwise and for few samples.

    Args:
        samples: Real numbers of any shape.
        bits: Width of a code, 1 to 8.
        iterations: At most so many; stops before where no sample changes its cell.
        zero: Whether one level is held at exactly 0.

    Returns:
        The codebook ``lloyd4`` (``lloyd4zero``), …, its codes in increasing order of value.

    Raises:
        DyBitError: ``samples`` hold NaN or infinity, are empty, or have fewer than 2^bits distinct values, or a
            parameter is out of range.
    """
    check_integer("bits", bits, 1, 8)
    check_integer("iterations", iterations, 1, 1_000_000)
    name = f"lloyd{bits}{'zero' * zero}"
    ordered = _checked(samples, 1 << bits, name)
    # Exact scaling to [-1, 1] keeps the sums of tiny and of huge samples in range.
    exponent = int(np.frexp(max(-ordered[0], ordered[-1]))[1])
    ordered = np.ldexp(ordered, -exponent)
    sums = np.concatenate(([0.0], np.cumsum(ordered)))
    ends = [_iterate(ordered, sums, start, iterations, zero) for start in _starts(ordered, 1 << bits)]
    best = min(ends, key=lambda levels: _error(ordered, levels))
    return Table(name, np.ldexp(best, exponent))


def _iterate(
    ordered: NDArray[np.float64], sums: NDArray[np.float64], levels: NDArray[np.float64], iterations: int, zero: bool
) -> NDArray[np.float64]:
    """Runs one start until no sample changes its cell."""
    # The level nearest to zero stays at zero, so the others keep their order and their side.
    pinned = [int(np.argmin(np.abs(levels)))] if zero else []
    levels[pinned] = 0.0
    edges = np.zeros(0, dtype=np.intp)
    for _ in range(iterations):
        previous, edges = edges, _edges(ordered, levels)
        if np.array_equal(edges, previous):
            break
        levels = _means(ordered, sums, edges, levels)
        levels[pinned] = 0.0
    return levels


def _checked(samples: ArrayLike, count: int, name: str) -> NDArray[np.float64]:
    """Returns the samples sorted, float64 of shape (samples,)."""
    flat = np.asarray(samples, dtype=np.float64).ravel()
    bad = ~np.isfinite(flat)
    if bad.any():
        position = int(np.argmax(bad))
        raise DyBitError(f"samples of {name} must be finite, not {flat[position]} at position {position}")
    ordered = np.sort(flat)
    distinct = int(np.count_nonzero(np.diff(ordered))) + 1 if ordered.size else 0
    if distinct < count:
        raise DyBitError(f"samples of {name} need at least {count} distinct values, found {distinct}")
    return ordered


def _starts(ordered: NDArray[np.float64], count: int) -> Iterator[NDArray[np.float64]]:
    """The levels to start from, one of which suits dense samples and the other one distant clusters."""
    shares = (np.arange(count) + 0.5) / count
    # The optimal density of levels is the cube root of the samples' (Panter and Dite, 1951): between two quantiles
    # of the samples, a gap apart, gap^(2/3). From mere quantiles, 256 levels end 1.6 dB short on a Gaussian.
    grid = ordered[np.linspace(0, ordered.size - 1, min(ordered.size, 32 * count)).astype(np.intp)]
    share = np.concatenate(([0.0], np.cumsum(np.diff(grid) ** (2 / 3))))
    yield np.interp(shares * share[-1], share, grid)
    distinct = np.unique(ordered)
    for samples in (ordered, distinct):  # repeated samples may make levels equal
        levels = samples[(shares * samples.size).astype(np.intp)]
        if np.all(levels[1:] > levels[:-1]):
            yield levels
            break


def _edges(ordered: NDArray[np.float64], levels: NDArray[np.float64]) -> NDArray[np.intp]:
    """The number of samples at or below each midpoint."""
    return np.searchsorted(ordered, (levels[:-1] + levels[1:]) / 2, side="right")


def _error(ordered: NDArray[np.float64], levels: NDArray[np.float64]) -> float:
    """The sum of squared errors."""
    counts = np.diff(np.concatenate(([0], _edges(ordered, levels), [ordered.size])))
    return float(np.sum((ordered - np.repeat(levels, counts)) ** 2))


def _means(
    ordered: NDArray[np.float64], sums: NDArray[np.float64], edges: NDArray[np.intp], levels: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The mean of every cell; a cell without samples keeps its level."""
    bounds = np.concatenate(([0], edges, [ordered.size]))
    counts = np.diff(bounds)
    means = np.diff(sums[bounds]) / np.maximum(counts, 1)
    # Rounding of the prefix sums must not carry a mean out of its cell.
    means = np.clip(means, ordered[np.minimum(bounds[:-1], ordered.size - 1)], ordered[np.maximum(bounds[1:] - 1, 0)])
    return np.where(counts > 0, means, levels)
