"""The codec against exact rational arithmetic, and its thresholds against the codec."""

from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dybit.errors import DyBitError
from dybit.formats.codebook import Codebook, Family, Table
from dybit.formats.format import Format, variants

NF_LIKE = np.array([-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0], np.float32)
TABLES = [
    Table("asymmetric", np.concatenate((NF_LIKE, np.float32(0.83) * -NF_LIKE[:7][::-1], [np.float32(1.0)]))),
    Table("unordered", [3.0, -1.0, 0.0, 0.5, 0.0, np.nan, -7.0, 3.0]),
    # Midpoints that float64 cannot hold.
    Table("wide", [0.0, 2.0**-120, 1.0, 2.0**100]),
    Table("inexact", [-0.7, -0.1, 0.3, 0.30000000000000004, 1 / 3, 0.7, 0.9, np.pi]),
    Table("one_bit", [-1.0, 1.0]),
]
FORMATS: list[Codebook] = [fmt for bits in range(2, 9) for signed in (True, False) for fmt in variants(bits, signed)]
BOOKS = FORMATS + TABLES
each = pytest.mark.parametrize("book", BOOKS, ids=str)
SAMPLE = [Format(4), Format(4, False), Format(3, max_run=1, midrise=True), Format(4, spare=True), Format(8), *TABLES]


class Exact:
    """Nearest value with the ties of docs/format.md, section 4, in rational arithmetic.

    The spare level is known by its definition: the code of negative zero.
    """

    def __init__(self, book):
        by_value = {}
        for code, value in enumerate(book.values.tolist()):
            if value == value:
                by_value.setdefault(Fraction(value), code)  # of equal values the smallest code
        self.by_value = by_value
        self.levels = sorted(by_value)
        self.spare = 1 << (book.bits - 1) if isinstance(book, Format) and book.spare else None

    def encode(self, x):
        """Looks at the levels on both sides of x."""
        if np.isinf(x):
            return self.by_value[self.levels[-1 if x > 0 else 0]]
        x = Fraction(float(x))
        i = bisect_left(self.levels, x)
        return self.winner(x, self.levels[max(i - 1, 0) : i + 1])

    def brute(self, x):
        """Looks at all levels."""
        return self.winner(Fraction(float(x)), self.levels)

    def winner(self, x, candidates):
        best = min(abs(level - x) for level in candidates)
        codes = [self.by_value[level] for level in candidates if abs(level - x) == best]
        if len(codes) > 1:
            codes = [code for code in codes if code != self.spare]
        return min(codes, key=lambda code: (code % 2, code))


def neighbours(values, dtype):
    """The values in dtype, each with the next number on both sides."""
    middle = np.asarray(values, dtype=dtype)
    return np.concatenate((np.nextafter(middle, dtype(-np.inf)), middle, np.nextafter(middle, dtype(np.inf))))


def interesting(book, dtype):
    """Levels, midpoints, both their neighbours, saturation, zeros, subnormals: all in dtype."""
    levels = np.array(sorted({v for v in book.values.tolist() if v == v}))
    midpoints = [float((Fraction(a) + Fraction(b)) / 2) for a, b in pairwise(levels)]
    tiny, top = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    ends = [0.0, -0.0, tiny, -tiny, 3 * tiny, -3 * tiny, top, -top, np.inf, -np.inf]
    beyond = [levels[0] * 1.5, levels[-1] * 1.5, levels[0] - 1, levels[-1] + 1]
    return np.concatenate((neighbours(levels, dtype), neighbours(midpoints, dtype), np.array(ends + beyond, dtype)))


@each
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_encode_is_exact(book, dtype):
    exact = Exact(book)
    x = interesting(book, dtype)
    codes = book.encode(x)
    assert codes.dtype == np.uint8
    assert codes.tolist() == [exact.encode(v) for v in x.tolist()]


@pytest.mark.parametrize("book", [book for book in BOOKS if book.bits <= 4], ids=str)
def test_encode_against_all_levels(book):
    exact = Exact(book)
    x = interesting(book, np.float64)
    x = x[np.isfinite(x)]
    assert book.encode(x).tolist() == [exact.brute(v) for v in x.tolist()]


@each
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_boundaries_bucketize_like_encode(book, dtype):
    thresholds = book.boundaries(dtype)
    assert thresholds.dtype == dtype
    assert np.all(np.diff(thresholds) >= 0)
    x = interesting(book, dtype)
    x = np.concatenate((x, np.random.default_rng(0).normal(scale=book.levels[-1] / 2, size=500).astype(dtype)))
    index = np.searchsorted(thresholds, x, side="left")
    assert book.level_codes[index].tolist() == book.encode(x).tolist()


@given(x=st.floats(allow_nan=False), book=st.sampled_from(BOOKS))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_encode_of_any_float(x, book):
    assert int(book.encode(x)) == Exact(book).encode(x)


@given(share=st.floats(0, 1), data=st.data())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_encode_between_levels(share, data):
    book = data.draw(st.sampled_from(BOOKS))
    i = data.draw(st.integers(0, len(book.levels) - 2))
    x = float(book.levels[i] + share * (book.levels[i + 1] - book.levels[i]))
    assert int(book.encode(x)) == Exact(book).encode(x)


@each
def test_decode_then_encode(book):
    codes = np.arange(1 << book.bits)
    values = book.decode(codes)
    used = ~np.isnan(values)
    back = book.decode(book.encode(values[used]))
    assert back.tolist() == values[used].tolist()
    assert not np.signbit(back[back == 0]).any()
    assert book.encode(book.levels).tolist() == book.level_codes.tolist()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zero_and_saturation(fmt):
    zero = fmt.encode([0.0, -0.0]).tolist()
    assert zero == [0, 0]  # all zeros, or the smallest positive value of a mid-rise format
    top = fmt.decode(fmt.encode([1e30, np.inf, -1e30, -np.inf])).tolist()
    assert top == [fmt.values.max()] * 2 + [fmt.values.min()] * 2
    if not fmt.signed:
        assert fmt.encode([-1e-30, -5.0, -np.inf]).tolist() == [0, 0, 0]
    if fmt.signed and not fmt.midrise and not fmt.spare:
        # Negative zero is never produced, not even by what rounds to it.
        assert 1 << (fmt.bits - 1) not in fmt.encode(interesting(fmt, np.float64))


@pytest.mark.parametrize(
    ("fmt", "x", "value"),
    [
        # 4-bit signed DyBit: 0, .25, .5, .75, 1, 1.5, 2, 4. Ties go to the even code.
        (Format(4), 0.125, 0.0),
        (Format(4), 0.375, 0.5),
        (Format(4), 1.25, 1.0),
        (Format(4), 1.75, 2.0),  # codes 5 and 6
        (Format(4), 3.0, 2.0),
        (Format(4), -3.0, -2.0),
        (Format(4), 3.0000000000000004, 4.0),
        (Format(4), -0.125, 0.0),
        # Spare, 2.5: ties go away from it.
        (Format(4, spare=True), 2.25, 2.0),
        (Format(4, spare=True), 3.25, 4.0),
        (Format(4, max_run=2, spare=True), 2.25, 2.0),
        (Format(4, max_run=2, spare=True), 2.75, 3.0),
        (Format(4, max_run=1, spare=True), 2.125, 1.75),
        (Format(4, spare=True), -2.5, -2.0),
        (Format(2, spare=True), 1.5, 1.0),
        (Format(2, spare=True), -0.5, 0.0),
        # Mid-rise: 0 is a tie of ±0.5 and goes up.
        (Format(2, midrise=True), -0.0, 0.5),
        (Format(2, midrise=True), -1e-300, -0.5),
        (Format(2, midrise=True), 1.0, 0.5),
    ],
)
def test_golden_ties(fmt, x, value):
    assert float(fmt.decode(fmt.encode(x))) == value


@pytest.mark.parametrize(
    ("x", "where"),
    [([0.0, np.nan, np.nan], "(1,)"), (np.full((2, 3), np.nan), "(0, 0)"), ([[1, 2], [3, np.nan]], "(1, 1)")],
)
def test_nan_names_the_position(x, where):
    with pytest.raises(DyBitError) as error:
        Format(4).encode(x)
    assert f"x holds NaN at position {where}" in str(error.value)
    assert "s4" in str(error.value)


def test_nan_scalar():
    with pytest.raises(DyBitError, match="x holds NaN"):
        Format(4).encode(np.nan)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_shapes(shape):
    codes = Format(4).encode(np.zeros(shape))
    assert codes.shape == shape
    assert Format(4).decode(codes).shape == shape


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([16], "codes of s4 are 0 to 15, not 16"),
        ([0, -1], "codes of s4 are 0 to 15, not -1"),
        (np.array([[3, 200]], dtype=np.uint8), "not 200"),
        ([1.0], "codes must be integers, not float64"),
        ([True], "codes must be integers, not bool"),
        (["1"], "codes must be integers"),
    ],
)
def test_decode_errors(codes, message):
    with pytest.raises(DyBitError) as error:
        Format(4).decode(codes)
    assert message in str(error.value)


def test_equal_values_take_the_smallest_code():
    book = Table("unordered", [3.0, -1.0, 0.0, 0.5, 0.0, np.nan, -7.0, 3.0])
    assert book.levels.tolist() == [-7.0, -1.0, 0.0, 0.5, 3.0]
    assert book.level_codes.tolist() == [6, 1, 2, 3, 0]
    # -7 (code 6) and -1 (1): the even one. 0 (2) and 0.5 (3): the even one. 0.5 (3) and 3 (0): the even one.
    assert book.encode([-4.0, 0.25, 1.75]).tolist() == [6, 2, 0]


def test_ties_of_equal_parity_take_the_smaller_code():
    book = Table("even", [4.0, 9.0, 2.0, 7.0])
    assert book.encode(3.0) == 0  # 2 (code 2) and 4 (code 0)
    assert book.encode(8.0) == 1  # 7 (code 3) and 9 (code 1)


def test_table_is_frozen_and_compares_by_value():
    values = np.array([0.0, 1.0, np.nan, -1.0])
    book = Table("t", values)
    values[0] = 5
    assert book.values[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        book.values[0] = 1
    assert book == Table("t", [0, 1, np.nan, -1])
    assert hash(book) == hash(Table("t", [0, 1, np.nan, -1]))
    assert book != Table("t", [0, 1, 2, -1])
    assert book != Table("u", book.values)
    assert book != Format(2)
    assert (book.bits, str(book), repr(book)) == (2, "t", "Table('t', 2 bits)")


@pytest.mark.parametrize("values", [[], [1.0], [1, 2, 3], [[1, 2], [3, 4]], np.zeros(512), 1.0])
def test_table_rejects_shapes(values):
    with pytest.raises(DyBitError, match="values of bad must be 2 to 256 numbers, a power of two"):
        Table("bad", values)


@pytest.mark.parametrize("values", [[1.0, np.inf], [1.0, 1.0], [0.0, -0.0], [np.nan, 1.0], [np.nan, np.nan]])
def test_table_rejects_values(values):
    with pytest.raises(DyBitError, match="values of bad must be finite or NaN, and at least two of them different"):
        Table("bad", values)


def test_symmetric():
    assert Format(4).symmetric
    assert Format(4, midrise=True).symmetric
    assert not Format(4, spare=True).symmetric
    assert not Format(4, signed=False).symmetric


def test_family():
    family = Family("dybit4", variants(4))
    assert (family.bits, family.choice_bits, str(family)) == (4, 4, "dybit4")
    assert Family("one", (Format(4),)).choice_bits == 0
    assert Family("two", (Format(4), Format(4, max_run=2))).choice_bits == 1
    with pytest.raises(DyBitError, match=r"bad has widths \[3, 4\]"):
        Family("bad", (Format(4), Format(3)))
    with pytest.raises(DyBitError, match="1 to 256 codebooks"):
        Family("bad", ())
    with pytest.raises(DyBitError, match="1 to 256 codebooks"):
        Family("bad", (Format(4),) * 257)
