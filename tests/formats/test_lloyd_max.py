"""Lloyd-Max against published values, an exact optimum, and the fixed formats."""

from statistics import NormalDist

import numpy as np
import pytest

from dybit.errors import DyBitError
from dybit.formats import catalogue, lloyd_max


def sqnr(x, book):
    error = x - book.levels[np.searchsorted(book.midpoints, x)]
    return 10 * np.log10(np.sum(x**2) / np.sum(error**2))


def least_error(ordered, count):
    """The least sum of squared errors of any codebook, by dynamic programming over the sorted samples."""
    n = ordered.size
    s1, s2 = np.concatenate(([0], np.cumsum(ordered))), np.concatenate(([0], np.cumsum(ordered**2)))
    best = np.concatenate(([0.0], np.full(n, np.inf)))
    for _ in range(count):
        grown = best.copy()
        for stop in range(1, n + 1):
            start = np.arange(stop)
            cell = (s2[stop] - s2[start]) - (s1[stop] - s1[start]) ** 2 / (stop - start)
            grown[stop] = min(grown[stop], (best[:stop] + cell).min())
        best = grown
    return best[n]


# Max (1960), table 1: SQNR of the optimal quantizer of a Gaussian for 2, 4, 8, 16 and 32 levels.
@pytest.mark.parametrize(("bits", "db"), [(1, 4.40), (2, 9.30), (3, 14.62), (4, 20.22), (5, 26.02)])
def test_lloyd_max_of_a_gaussian(bits, db):
    count = 100_000
    x = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])  # no sampling noise
    book = lloyd_max.lloyd_max(x, bits)
    assert (book.name, book.bits, len(book.levels)) == (f"lloyd{bits}", bits, 1 << bits)
    assert sqnr(x, book) == pytest.approx(db, abs=0.02)


@pytest.mark.parametrize("draw", ["normal", "laplace", "student", "clusters", "relu", "outlier"])
@pytest.mark.parametrize("bits", [2, 3])
def test_lloyd_max_is_near_the_optimum(draw, bits):
    generator = np.random.default_rng(7)
    x = {
        "normal": lambda: generator.standard_normal(300),
        "laplace": lambda: generator.laplace(size=300),
        "student": lambda: generator.standard_t(3, size=300),
        "clusters": lambda: np.concatenate((generator.normal(-5, 0.1, 150), generator.normal(3, 2, 150))),
        "relu": lambda: np.maximum(generator.standard_normal(300), 0),
        "outlier": lambda: np.append(generator.standard_normal(299), 1e3),
    }[draw]()
    book = lloyd_max.lloyd_max(x, bits)
    error = np.sum((x - book.decode(book.encode(x))) ** 2)
    least = least_error(np.sort(x), 1 << bits)
    assert least * (1 - 1e-6) <= error <= least * 1.25  # so few samples have many local optima


@pytest.mark.parametrize("zero", [False, True])
def test_lloyd_max_is_converged_and_deterministic(zero):
    x = np.random.default_rng(3).laplace(size=(50, 400))
    book = lloyd_max.lloyd_max(x, 4, zero=zero)
    assert book == lloyd_max.lloyd_max(x.ravel()[::-1], 4, zero=zero)
    assert book.name == ("lloyd4zero" if zero else "lloyd4")
    cells = np.searchsorted(book.midpoints, x.ravel())
    means = np.array([x.ravel()[cells == i].mean() for i in range(16)])
    expected = np.where(book.levels == 0, 0, means) if zero else means
    assert book.levels == pytest.approx(expected, abs=1e-12)
    assert (0.0 in book.levels) == zero


def test_lloyd_max_beats_every_fixed_format():
    x = np.random.default_rng(5).standard_normal(20_000)
    for bits in range(2, 9):
        bound = sqnr(x, lloyd_max.lloyd_max(x, bits))
        for name in (f"nf{bits}", f"int{bits}"):
            (book,) = catalogue.family(name).books
            scales = np.linspace(0.3, 1.5, 25) * np.abs(x).max() / np.abs(book.levels).max()
            assert max(sqnr(x / scale, book) for scale in scales) < bound


def test_lloyd_max_of_a_million_samples():
    x = np.random.default_rng(0).standard_normal(1_000_000)
    assert sqnr(x, lloyd_max.lloyd_max(x, 4)) == pytest.approx(20.22, abs=0.05)


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1e30, 1e300])
def test_lloyd_max_of_any_magnitude(factor):
    x = np.random.default_rng(0).standard_normal(1000)
    expected = lloyd_max.lloyd_max(x, 3).levels * factor
    assert lloyd_max.lloyd_max(x * factor, 3).levels == pytest.approx(expected, rel=1e-9)


def test_lloyd_max_of_few_values():
    assert lloyd_max.lloyd_max([3, 1, 2, 4, 1, 1, 1], 2).levels.tolist() == [1, 2, 3, 4]
    assert lloyd_max.lloyd_max([5.0, 6.0], 1, zero=True).levels.tolist()[0] == 0
    assert lloyd_max.lloyd_max([0.0] * 1000 + [1.0, 2.0, 3.0], 2).levels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lloyd_max.lloyd_max([], 2), "need at least 4 distinct values, found 0"),
        (lambda: lloyd_max.lloyd_max([1.0, 1.0, 2.0, 3.0], 2), "need at least 4 distinct values, found 3"),
        (lambda: lloyd_max.lloyd_max([1.0, 2.0, np.nan], 1), "must be finite, not nan at position 2"),
        (lambda: lloyd_max.lloyd_max([[1.0, 2.0], [-np.inf, 3.0]], 1), "must be finite, not -inf at position 2"),
        (lambda: lloyd_max.lloyd_max([1.0, 2.0], 9), "bits must be an integer from 1 to 8, not 9"),
        (lambda: lloyd_max.lloyd_max([1.0, 2.0], 1, iterations=0), "iterations must be an integer from 1 to"),
    ],
)
def test_lloyd_max_errors(call, message):
    with pytest.raises(DyBitError) as error:
        call()
    assert message in str(error.value)
