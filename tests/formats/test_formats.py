"""The rivals against independent implementations, published tables, and the identities that tie them to DyBit."""

import subprocess
import sys
import time
from fractions import Fraction
from itertools import product
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
import softposit

from dybit.errors import DyBitError
from dybit.formats import catalogue, lloyd_max, tables
from dybit.formats.format import Format, variants
from dybit.formats.tables import adaptive_float, integer_with_zero, normal_quantiles

WIDTHS = range(2, 9)
NAMES = catalogue.names()
# bitsandbytes 0.45, functional.py, get_4bit_type("nf4").
NF4 = [
    *[-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453],
    *[-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0],
    *[0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
    *[0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
]


def magnitudes(book):
    """Distinct absolute values in increasing order, the largest scaled to 1."""
    values = np.unique(np.abs(book.levels))
    return (values / values[-1]).tolist()


def contains(family, levels):
    """Whether a codebook of the family has exactly these levels, up to a positive scale."""
    wanted = levels / np.abs(levels).max()
    return any(np.array_equal(book.levels / np.abs(book.levels).max(), wanted) for book in family.books)


# Integers


@pytest.mark.parametrize("bits", WIDTHS)
def test_integers(bits):
    half = 1 << (bits - 1)
    assert tables.integer(bits).levels.tolist() == list(range(-half + 1, half))
    assert tables.integer_full(bits).levels.tolist() == list(range(-half, half))
    assert tables.unsigned_integer(bits).values.tolist() == list(range(2 * half))
    for book in (tables.integer(bits), tables.integer_full(bits)):  # two's complement
        for code, value in enumerate(book.values):
            assert np.isnan(value) or int(value) & (2 * half - 1) == code
    assert np.isnan(tables.integer(bits).values[half])


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "1.26.0", reason="ml_dtypes.int4 needs NumPy 1.26")
def test_int4_is_that_of_ml_dtypes():
    table = np.arange(-8, 8).astype(ml_dtypes.int4).astype(np.float64)
    assert tables.integer_full(4).levels.tolist() == table.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_asymmetric_integers(bits):
    family = catalogue.integer_asymmetric(bits)
    top = (1 << bits) - 1
    assert len(family.books) == min(1 << bits, 64)
    zeros = [int(-book.values[0]) for book in family.books]
    assert zeros == sorted(set(zeros))
    assert (zeros[0], zeros[-1]) == (0, top)
    assert max(np.diff(zeros)) <= (1 if bits <= 6 else 5)
    for book, zero in zip(family.books, zeros, strict=True):
        assert book.values.tolist() == [code - zero for code in range(top + 1)]
        assert book == integer_with_zero(bits, zero)


# Minifloats


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("e2m1", ml_dtypes.float4_e2m1fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e4m3fn", ml_dtypes.float8_e4m3fn),
        ("e4m3ieee", ml_dtypes.float8_e4m3),
        ("e3m4ieee", ml_dtypes.float8_e3m4),
        ("e5m2ieee", ml_dtypes.float8_e5m2),
    ],
)
def test_minifloats_equal_ml_dtypes(name, dtype):
    (book,) = catalogue.family(name).books
    table = np.arange(1 << book.bits, dtype=np.uint8).view(dtype).astype(np.float64)
    assert np.array_equal(book.values, np.where(np.isfinite(table), table, np.nan), equal_nan=True)
    # The same rounding too: nearest, ties to even; ml_dtypes overflows where dybit saturates.
    x = np.random.default_rng(0).normal(scale=book.levels[-1] / 4, size=2000)
    middle = book.midpoints.astype(np.float32)  # ml_dtypes rounds float64 by way of float32
    x = np.concatenate(
        (x.astype(np.float32), middle, np.nextafter(middle, 2 * middle), np.nextafter(middle, 0 * middle))
    )
    x = x[np.abs(x) <= book.levels[-1]]
    assert book.decode(book.encode(x)).tolist() == x.astype(dtype).astype(np.float64).tolist()


SPLITS = [(e, m, s) for e, m, s in product(range(1, 8), range(8), (True, False)) if 2 <= e + m + s <= 8]


@pytest.mark.parametrize(("e", "m", "signed"), SPLITS)
def test_minifloats_by_definition(e, m, signed):
    book = tables.minifloat(e, m, signed)
    assert book.bits == e + m + signed
    bias = 2 ** (e - 1) - 1
    for code, value in enumerate(book.values):
        sign, exponent, fraction = code >> (e + m), code >> m & (2**e - 1), Fraction(code & (2**m - 1), 2**m)
        expected = Fraction(2) ** (max(exponent, 1) - bias) * (fraction + (exponent > 0))
        assert Fraction(float(value)) == (-expected if sign else expected)


@pytest.mark.parametrize("bits", range(3, 9))
def test_one_exponent_bit_is_an_integer(bits):
    assert magnitudes(tables.minifloat(1, bits - 2)) == magnitudes(tables.integer(bits))


# NormalFloat


def test_nf4_is_the_published_one():
    assert tables.normal_float(4).values.tolist() == NF4
    # The construction used at the other widths gives it too, but for the authors' float32 arithmetic.
    assert normal_quantiles(4) == pytest.approx(NF4, abs=3e-7)


@pytest.mark.parametrize("bits", WIDTHS)
def test_normal_float(bits):
    book = tables.normal_float(bits)
    values = book.values
    assert np.all(np.diff(values) > 0)
    assert (values[0], values[(1 << (bits - 1)) - 1], values[-1]) == (-1, 0, 1)
    assert values.tolist() == values.astype(np.float32).tolist()
    assert sum(values > 0) == sum(values < 0) + 1 == 1 << (bits - 1)
    if bits > 2:
        # Evenly spaced probabilities: the steps in probability of each half are equal.
        scipy_stats = pytest.importorskip("scipy.stats")
        edge = scipy_stats.norm.ppf(1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2)
        steps = np.diff(scipy_stats.norm.cdf(values * edge))
        half = (1 << (bits - 1)) - 1
        assert steps[:half] == pytest.approx(steps[0], rel=1e-4)
        assert steps[half:] == pytest.approx(steps[-1], rel=1e-4)


# Posits


def softposit_value(code, bits, es):
    """A narrow posit is a wide one with zeros appended, so softposit's fixed widths serve all."""
    if es == 0:
        number, width = softposit.posit8(), 8
    elif es == 1:
        number, width = softposit.posit16(), 16
    else:
        number, width = softposit.posit32(), 32
    number.fromBits(code << (width - bits))
    return float(number)  # NaR comes out as infinity


@pytest.mark.parametrize("es", [0, 1, 2])
@pytest.mark.parametrize("bits", WIDTHS)
def test_posits_equal_softposit(bits, es):
    values = tables.posit(bits, es).values
    for code, value in enumerate(values):
        if code == 1 << (bits - 1):
            assert np.isnan(value)
        else:
            assert value == softposit_value(code, bits, es)


@pytest.mark.parametrize("bits", WIDTHS)
def test_posits_of_two_exponent_bits_at_their_own_width(bits):
    for code, value in enumerate(tables.posit(bits, 2).values):
        number = softposit.posit_2(0, bits)
        number.fromBits(code << (32 - bits))
        assert np.isnan(value) or value == float(number)


@pytest.mark.parametrize("es", [0, 1, 2, 3])
@pytest.mark.parametrize("bits", WIDTHS)
def test_posits_by_prefix_and_symmetry(bits, es):
    values = tables.posit(bits, es).values
    half = 1 << (bits - 1)
    assert np.all(np.diff(values[:half]) > 0)
    assert values[half - 1] == 2.0 ** ((1 << es) * (bits - 2))
    assert (values[1:half] * values[half - 1 : 0 : -1]).tolist()[0] == 1  # smallest times largest
    assert values[half + 1 :].tolist() == (-values[half - 1 : 0 : -1]).tolist()
    if bits < 8:
        assert np.array_equal(tables.posit(bits + 1, es).values[::2], values, equal_nan=True)


# flint, and what DyBit shares with it


def ant_flint_levels(m):
    """Magnitudes of flint as the paper counts them: 0, then each exponent with the fraction bits left to it."""
    levels = {Fraction(0)}
    for exponent in range(2 * m - 1):
        # The bits of 0…01 below the middle, of 10…01 above it; the rest is the fraction.
        spent = m - exponent if exponent < m - 1 else exponent - m + 3
        left = max(m - spent, 0)
        levels |= {Fraction(2) ** exponent * (1 + Fraction(i, 2**left)) for i in range(2**left)}
    return sorted(levels)


@pytest.mark.parametrize("m", range(2, 9))
def test_flint_levels(m):
    expected = [float(level) for level in ant_flint_levels(m)]
    assert sorted(tables.flint(m, signed=False).values.tolist()) == expected
    if m < 8:
        signed = tables.flint(m + 1)
        assert sorted(signed.values[: 1 << m].tolist()) == expected
        assert signed.values[1 << m :].tolist() == (0 - signed.values[: 1 << m]).tolist()


def test_flint_table():
    # ANT, table of the 4-bit unsigned flint: 0000 … 0111, 1000, 1001, 101x, 11xx.
    assert tables.flint(4, signed=False).values.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 64, 32, 16, 24, 8, 10, 12, 14]


@pytest.mark.parametrize("m", range(2, 9))
def test_full_dybit_has_the_levels_of_flint(m):
    full = Format(m, signed=False)
    assert (full.levels * 2 ** (m - 1)).tolist() == tables.flint(m, signed=False).levels.tolist()
    if m < 8:
        assert (Format(m + 1).levels * 2 ** (m - 1)).tolist() == tables.flint(m + 1).levels.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_full_dybit_has_the_levels_of_posit_es_0(bits):
    # m = bits - 1, posit(m + 1, 0): up to the scale of 1/2 where there is more than one magnitude.
    assert magnitudes(Format(bits)) == magnitudes(tables.posit(bits, 0))
    if bits > 2:
        assert Format(bits).levels.tolist() == tables.posit(bits, 0).levels.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_dybit_contains_its_relatives(bits):
    family = catalogue.dybit(bits, kind="plain")
    assert contains(family, tables.integer(bits).levels)
    assert contains(family, tables.posit(bits, 0).levels)
    if bits > 2:
        assert contains(family, tables.minifloat(2, bits - 3).levels)
        assert contains(family, tables.flint(bits).levels)
    unsigned = catalogue.dybit(bits, signed=False)
    assert contains(unsigned, tables.unsigned_integer(bits).levels)
    assert contains(unsigned, tables.minifloat(2, bits - 2, signed=False).levels)
    assert contains(unsigned, tables.flint(bits, signed=False).levels)


def test_only_middle_runs_are_new():
    # 2 < r < m, the accuracy claim of docs/format.md: no relative has these levels.
    known = [tables.integer(8), tables.minifloat(2, 5), tables.minifloat(3, 4), tables.flint(8), tables.posit(8, 1)]
    for run in (3, 4, 5, 6):
        assert magnitudes(Format(8, max_run=run)) not in [magnitudes(book) for book in known]


# Powers of two, AdaptivFloat


@pytest.mark.parametrize("bits", WIDTHS)
def test_power_of_two(bits):
    for signed in (True, False):
        book = tables.power_of_two(bits, signed)
        count = 1 << (bits - signed)
        assert book.values[:count].tolist() == [0.0, *(2.0 ** (code - count + 1) for code in range(1, count))]
        assert len(book.levels) == (2 * count - 1 if signed else count)


# Exponents of the terms in the authors' build_power_value, for the widths that it knows; 7 and 8 by the same rule.
APOT = {
    1: [[1]],
    2: [[1, 2, 3]],
    3: [[1, 2, 4], [3]],
    4: [[1, 3, 5], [2, 4, 6]],
    5: [[1, 3, 6], [2, 4, 7], [5]],
    6: [[1, 4, 7], [2, 5, 8], [3, 6, 9]],
    7: [[1, 4, 8], [2, 5, 9], [3, 6, 10], [7]],
    8: [[1, 5, 9], [2, 6, 10], [3, 7, 11], [4, 8, 12]],
}


@pytest.mark.parametrize("m", APOT)
def test_additive_power_of_two(m):
    expected = {Fraction(0)}
    for term in APOT[m]:
        expected = {a + b for a in expected for b in [Fraction(0), *(Fraction(1, 2**e) for e in term)]}
    assert len(expected) == 1 << m
    books = [tables.additive_power_of_two(m, signed=False)] if m >= 2 else []
    books += [tables.additive_power_of_two(m + 1)] if m <= 7 else []
    for book in books:
        assert book.levels[book.levels >= 0].tolist() == sorted(float(level) for level in expected)


def test_apot_codes_are_their_terms():
    values = tables.additive_power_of_two(4, signed=False).values
    assert values[0b0100] == 2**-1
    assert values[0b0110] == 2**-1 + 2**-4
    assert values[0b1111] == 2**-5 + 2**-6


@pytest.mark.parametrize("bits", WIDTHS)
def test_adaptivfloat(bits):
    family = catalogue.adaptivfloat(bits)
    assert (family.scale, family.group_size) == ("pow2", None)
    assert [book.name for book in family.books] == [f"adaptivfloat{bits}e{e}" for e in range(1, min(bits, 6))]
    for e, book in enumerate(family.books, 1):
        f = bits - 1 - e
        expected = {Fraction(0)}
        for exponent, fraction in product(range(2**e), range(2**f)):
            if (exponent, fraction) != (0, 0):
                expected.add(Fraction(2) ** (exponent - 2**e + 1) * (1 + Fraction(fraction, 2**f)))
        assert book.levels[book.levels >= 0].tolist() == sorted(float(level) for level in expected)


@pytest.mark.parametrize("e", [2, 3, 4])
def test_adaptivfloat_quantizes_like_the_paper(e):
    """The paper's algorithm 1 (round the mantissa, flush below half the smallest value, clamp), as it is written."""
    bits, f = 8, 7 - e
    x = np.random.default_rng(1).normal(size=4000)
    top = np.floor(np.log2(np.abs(x).max()))
    low = 2.0 ** (top - 2**e + 1) * (1 + 2.0**-f)
    high = 2.0**top * (2 - 2.0**-f)
    a = np.abs(x)
    exponent = np.floor(np.log2(np.maximum(a, low)))
    rounded = np.minimum(np.round(a / 2**exponent * 2**f) / 2**f * 2**exponent, high)
    expected = np.sign(x) * np.where(a < low / 2, 0, np.maximum(rounded, low))
    book = adaptive_float(bits, e)
    assert (book.decode(book.encode(x / 2**top)) * 2**top).tolist() == expected.tolist()


def test_ant_and_block_formats():
    assert [book.name for book in catalogue.ant(4).books] == ["int4full", "flint4", "pot4"]
    assert [book.name for book in catalogue.ant(4, signed=False).books] == ["uint4", "uflint4", "upot4"]
    described = {
        name: (catalogue.family(name).books[0].name, catalogue.family(name).scale, catalogue.family(name).group_size)
        for name in ("mxfp4", "nvfp4", "mxfp6e2m3", "mxfp6e3m2", "mxfp8e4m3", "mxfp8e5m2")
    }
    assert described == {
        "mxfp4": ("e2m1", "pow2", 32),
        "nvfp4": ("e2m1", "e4m3", 16),
        "mxfp6e2m3": ("e2m3", "pow2", 32),
        "mxfp6e3m2": ("e3m2", "pow2", 32),
        "mxfp8e4m3": ("e4m3fn", "pow2", 32),
        "mxfp8e5m2": ("e5m2ieee", "pow2", 32),
    }
    assert np.abs(catalogue.mxfp4().books[0].levels).max() == 6
    assert np.abs(catalogue.mxfp8().books[0].levels).max() == 448


# Lloyd-Max


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
    for bits in WIDTHS:
        bound = sqnr(x, lloyd_max.lloyd_max(x, bits))
        for name in (f"nf{bits}", f"int{bits}"):
            (book,) = catalogue.family(name).books
            scales = np.linspace(0.3, 1.5, 25) * np.abs(x).max() / np.abs(book.levels).max()
            assert max(sqnr(x / scale, book) for scale in scales) < bound


def test_lloyd_max_is_fast():
    x = np.random.default_rng(0).standard_normal(1_000_000)
    start = time.perf_counter()
    lloyd_max.lloyd_max(x, 4)
    assert time.perf_counter() - start < 5  # 0.2 s when the machine is idle


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


# Names


@pytest.mark.parametrize("name", NAMES)
def test_every_name_parses(name):
    family = catalogue.family(name)
    assert family.name == name
    assert catalogue.family(name) is family
    for book in family.books:
        finite = book.values[~np.isnan(book.values)]
        assert np.isfinite(finite).all()
        assert not np.signbit(finite[finite == 0]).any()
        assert not book.values.flags.writeable
        assert np.isfinite(book.levels.astype(np.float32)).all()
        # Every codebook can be had alone, so a stored name is enough to decode.
        assert catalogue.family(book.name).books == (book,)


def test_books_are_unique_by_name():
    by_name = {}
    for name in NAMES:
        for book in catalogue.family(name).books:
            assert by_name.setdefault(book.name, book) == book


@pytest.mark.parametrize(
    "book", [book for name in NAMES for book in catalogue.family(name).books if book.bits < 8][::3]
)
def test_zero_takes_its_smallest_code(book):
    zeros = np.flatnonzero(book.values == 0)
    if zeros.size:
        assert book.encode([0.0, -0.0]).tolist() == [zeros[0]] * 2


@pytest.mark.parametrize(
    "book",
    [
        catalogue.family(name).books[0]
        for name in ("nf4", "nf8", "posit8es2", "pot4", "upot8", "apot8", "e4m3fn", "flint8", "uflint4", "int4full")
    ],
    ids=str,
)
def test_thresholds_of_rivals(book):
    points = np.concatenate((book.levels, book.midpoints)).astype(np.float32)
    x = np.concatenate((np.nextafter(points, np.float32(-9)), points, np.nextafter(points, np.float32(9))))
    index = np.searchsorted(book.boundaries(np.float32), x, side="left")
    assert book.level_codes[index].tolist() == book.encode(x).tolist()
    distance = np.abs(x[:, None].astype(np.float64) - book.levels)
    assert np.array_equal(np.abs(x - book.decode(book.encode(x))), distance.min(axis=1))


def test_dybit_names():
    assert catalogue.family("dybit4").books == variants(4)
    assert catalogue.family("udybit4").books == variants(4, signed=False) == catalogue.family("udybit4plain").books
    assert [book.name for book in catalogue.family("dybit4plain").books] == ["s4r1", "s4r2", "s4"]
    assert [book.name for book in catalogue.family("dybit4mid").books] == ["s4r1mid", "s4r2mid", "s4mid"]
    assert [book.name for book in catalogue.family("dybit4spare").books] == ["s4r1spare", "s4r2spare", "s4spare"]
    assert catalogue.family("u8r3").books == (Format(8, False, 3),)
    assert catalogue.family("s4r2spare").books == (Format(4, max_run=2, spare=True),)
    assert catalogue.family("s4r3") is catalogue.family("s4")  # another spelling of the same format


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nf9", "there is no format 'nf9'; the nearest known ones are nf8"),
        ("dybit4spar", "the nearest known ones are dybit4spare"),
        ("nvpf4", "the nearest known ones are nvfp4"),
        ("int4as", "the nearest known ones are int4asym"),
        ("posit4", "posit4es"),
        ("INT4", "there is no format 'INT4'"),
        ("", "there is no format ''; examples are dybit4, s4r2, int4, e2m1 and nf4"),
        ("qqq", "examples are"),
        ("s9", "bits must be an integer from 2 to 8, not 9"),
        ("s4r4", "max_run for s4 must be an integer from 1 to 3, not 4"),
        ("u4mid", "midrise=True needs signed=True"),
        ("udybit2spare", "there is no format 'udybit2spare'"),
        (4, "the name of a format must be a string, not 4"),
        (None, "not None"),
        (["s4"], "not ['s4']"),
    ],
)
def test_unknown_names(spec, message):
    with pytest.raises(DyBitError) as error:
        catalogue.family(spec)
    assert message in str(error.value)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_families(bits, signed):
    shown = catalogue.families(bits, signed)
    names = [family.name for family in shown]
    assert len(set(names)) == len(names)
    assert names[0] == f"{'' if signed else 'u'}dybit{bits}"
    assert shown is catalogue.families(bits, signed)
    for family in shown:
        assert family.bits == bits
        assert catalogue.family(family.name) is family
        assert any((book.levels < 0).any() for book in family.books) == signed


def test_families_at_four_bits():
    names = {family.name for family in catalogue.families(4)}
    assert {"int4", "int4asym", "e2m1", "nf4", "posit4es1", "adaptivfloat4", "flint4", "pot4", "apot4"} < names
    assert {"ant4", "mxfp4", "nvfp4", "dybit4", "dybit4plain", "dybit4spare", "s4"} < names


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tables.integer(1), "bits must be an integer from 2 to 8, not 1"),
        (lambda: tables.integer_full(9), "not 9"),
        (lambda: tables.unsigned_integer(4.0), "not 4.0"),
        (lambda: catalogue.integer_asymmetric(0), "not 0"),
        (lambda: integer_with_zero(4, 16), "zero_point must be an integer from 0 to 15, not 16"),
        (lambda: tables.minifloat(0, 3), "exponent_bits must be an integer from 1 to 7, not 0"),
        (lambda: tables.minifloat(2, -1), "mantissa_bits must be an integer from 0 to 7, not -1"),
        (lambda: tables.minifloat(5, 5), "a minifloat has 2 to 8 bits, e5m5 would have 11"),
        (lambda: tables.minifloat(1, 0, signed=False), "ue1m0 would have 1"),
        (lambda: tables.minifloat(2, 1, special="nan"), "in a signed format of 8 bits, not 'nan'"),
        (lambda: tables.minifloat(4, 3, special="inf"), "not 'inf'"),
        (lambda: tables.normal_float(1), "not 1"),
        (lambda: tables.posit(9, 0), "bits must be an integer from 2 to 8, not 9"),
        (lambda: tables.posit(8, 4), "es must be an integer from 0 to 3, not 4"),
        (lambda: tables.flint(2), "bits of flint must be an integer from 3 to 8, not 2"),
        (lambda: tables.flint(1, signed=False), "bits of uflint must be an integer from 2 to 8, not 1"),
        (lambda: tables.power_of_two(True), "not True"),
        (lambda: tables.additive_power_of_two("4"), "not '4'"),
        (lambda: adaptive_float(4, 4), "exponent_bits must be an integer from 1 to 3, not 4"),
        (lambda: catalogue.adaptivfloat(9), "not 9"),
        (lambda: catalogue.ant(2), "bits of ant must be an integer from 3 to 8, not 2"),
        (lambda: catalogue.mxfp6(4), "exponent_bits of mxfp6 must be an integer from 2 to 3, not 4"),
        (lambda: catalogue.mxfp8(3), "exponent_bits of mxfp8 must be an integer from 4 to 5, not 3"),
        (lambda: catalogue.dybit(9), "bits must be an integer from 2 to 8, not 9"),
        (lambda: catalogue.dybit(4, kind="mid"), "kind must be one of all, plain, midrise, spare, not 'mid'"),
        (lambda: catalogue.dybit(2, False, kind="spare"), "there is no spare variant of bits=2, signed=False"),
        (
            lambda: catalogue.dybit(4, signed=False, kind="midrise"),
            "there is no midrise variant of bits=4, signed=False",
        ),
        (lambda: catalogue.families(1), "bits must be an integer from 2 to 8, not 1"),
    ],
)
def test_errors_quote_the_value(call, message):
    with pytest.raises(DyBitError) as error:
        call()
    assert message in str(error.value)


def test_imports_only_numpy():
    code = "import sys, dybit.formats; sys.exit(any(name in sys.modules for name in ('torch', 'scipy', 'ml_dtypes')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
