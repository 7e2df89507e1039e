"""Tables of other formats against independent implementations, published tables, and what ties them to DyBit."""

from fractions import Fraction
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import softposit

from dybit.errors import DyBitError
from dybit.formats import catalogue, tables
from dybit.formats.format import Format
from dybit.formats.tables import adaptive_float, integer_with_zero, normal_quantiles

WIDTHS = range(2, 9)
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


def test_only_middle_runs_are_new():
    # 2 < r < m, the accuracy claim of docs/format.md: no relative has these levels.
    known = [tables.integer(8), tables.minifloat(2, 5), tables.minifloat(3, 4), tables.flint(8), tables.posit(8, 1)]
    for run in (3, 4, 5, 6):
        assert magnitudes(Format(8, max_run=run)) not in [magnitudes(book) for book in known]


# Powers of two


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tables.integer(1), "bits must be an integer from 2 to 8, not 1"),
        (lambda: tables.integer_full(9), "not 9"),
        (lambda: tables.unsigned_integer(4.0), "not 4.0"),
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
    ],
)
def test_errors_quote_the_value(call, message):
    with pytest.raises(DyBitError) as error:
        call()
    assert message in str(error.value)
