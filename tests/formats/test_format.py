"""The number format against its tables, its properties and independent definitions of its relatives."""

import dataclasses
import pickle
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from dybit.errors import DyBitError
from dybit.formats.format import Fields, Format, variants

WIDTHS = range(2, 9)
FORMATS = [fmt for bits in WIDTHS for signed in (True, False) for fmt in variants(bits, signed)]
PLAIN = [fmt for fmt in FORMATS if not fmt.midrise and not fmt.spare]
MIDRISE = [fmt for fmt in FORMATS if fmt.midrise]
SPARE = [fmt for fmt in FORMATS if fmt.spare]

# docs/format.md, section 3: (m, r) and the values of the magnitude codes in order.
TABLES = {
    (1, 1): [0, 1],
    (2, 1): [0, 0.5, 1, 1.5],
    (2, 2): [0, 0.5, 1, 2],
    (3, 1): [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75],
    (3, 2): [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3],
    (3, 3): [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4],
    (4, 4): [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75, 2, 3, 4, 8],
}
MIDRISE_TABLES = {
    (2, 1): [0.5, 1.5],
    (3, 2): [0.25, 0.75, 1.5, 3],
    (4, 2): [0.125, 0.375, 0.625, 0.875, 1.25, 1.75, 2.5, 3.5],
    (4, 3): [0.125, 0.375, 0.625, 0.875, 1.25, 1.75, 3, 6],
}
# Largest significand, a row for every m from 1, a column for every r from 1.
LARGEST = [
    [1],
    [3, 4],
    [7, 12, 16],
    [15, 28, 48, 64],
    [31, 60, 112, 192, 256],
    [63, 124, 240, 448, 768, 1024],
    [127, 252, 496, 960, 1792, 3072, 4096],
    [255, 508, 1008, 1984, 3840, 7168, 12288, 16384],
]


def each(formats):
    return pytest.mark.parametrize("fmt", formats, ids=str)


def magnitudes(fmt):
    return fmt.values[: 1 << fmt.magnitude_bits]


def decode(pattern, max_run):
    """Section 2 of docs/format.md, word for word, on a string of magnitude bits."""
    m = len(pattern)
    run = min(m - len(pattern.lstrip("1")), max_run)
    if run == 0:
        return Fraction(int(pattern, 2), 1 << (m - 1))
    fraction = pattern[run:] if run == max_run else pattern[run + 1 :]
    return Fraction(2) ** (run - 1) * (1 + Fraction(int("0" + fraction, 2), 1 << len(fraction)))


def spare_value(fmt):
    return Fraction(5, 2) if fmt.bits > 2 else Fraction(2)


@pytest.mark.parametrize(("m", "r"), TABLES)
def test_tables(m, r):
    for fmt in (Format(m, False, r) if m >= 2 else None, Format(m + 1, True, r)):
        if fmt is not None:
            assert magnitudes(fmt).tolist() == TABLES[m, r]


@pytest.mark.parametrize(("bits", "r"), MIDRISE_TABLES)
def test_midrise_tables(bits, r):
    assert magnitudes(Format(bits, max_run=r, midrise=True)).tolist() == MIDRISE_TABLES[bits, r]


def test_eight_bit_table():
    # 0, 1/64, … 63/64, 1, 1+1/32, … and 32, 64 at the end.
    table = magnitudes(Format(8)).tolist()
    assert table[:64] == [i / 64 for i in range(64)]
    assert table[64:66] == [1, 1 + 1 / 32]
    assert table[-4:] == [16, 24, 32, 64]
    assert Format(8).max_significand == 4096


@each(PLAIN)
def test_largest_significand(fmt):
    assert fmt.max_significand == LARGEST[fmt.magnitude_bits - 1][fmt.max_run - 1]


@each(MIDRISE)
def test_largest_significand_of_midrise_is_a_row_further(fmt):
    # The row of m + 1 holds the all-ones code of one more bit, which mid-rise has too: its appended bit is a 1.
    assert fmt.max_significand == LARGEST[fmt.magnitude_bits][fmt.max_run - 1]


@each(SPARE)
def test_largest_significand_of_spare(fmt):
    plain = LARGEST[fmt.magnitude_bits - 1][fmt.max_run - 1]
    assert fmt.max_significand == max(plain, spare_value(fmt) * 2 ** (fmt.magnitude_bits - 1))


@each(FORMATS)
def test_values_follow_the_definition(fmt):
    m = fmt.magnitude_bits
    for code, value in enumerate(fmt.values):
        pattern = f"{code:0{fmt.bits}b}"[fmt.bits - m :]
        expected = decode(pattern + "1" * fmt.midrise, fmt.max_run)
        if fmt.signed and code >> m:
            expected = spare_value(fmt) if fmt.spare and "1" not in pattern else -expected
        assert Fraction(float(value)) == expected
        assert fmt.significands[code] * Fraction(fmt.step) == expected


@each(FORMATS)
def test_zero_is_never_negative(fmt):
    assert not np.signbit(fmt.values[fmt.values == 0]).any()


@each(FORMATS)
def test_magnitude_codes_are_monotone(fmt):
    assert np.all(np.diff(magnitudes(fmt)) > 0)


@each([fmt for fmt in PLAIN if fmt.bits < 8])
def test_appending_a_bit(fmt):
    # A zero leaves the value as it is; a one gives the mid-rise value, and the value halfway to the next code.
    wider = magnitudes(Format(fmt.bits + 1, fmt.signed, fmt.max_run))
    assert wider[::2].tolist() == magnitudes(fmt).tolist()
    if fmt.signed:
        assert wider[1::2].tolist() == magnitudes(Format(fmt.bits, True, fmt.max_run, midrise=True)).tolist()


@each(FORMATS)
def test_significands_fit_twice_the_bits(fmt):
    limit = 1 << (2 * fmt.bits - 1)
    assert fmt.significands.dtype == np.int64
    assert -limit <= fmt.significands.min() <= fmt.significands.max() < limit


@each(FORMATS)
def test_signs_mirror(fmt):
    if fmt.signed:
        half = 1 << fmt.magnitude_bits
        upper, lower = fmt.values[half:].tolist(), (-fmt.values[:half]).tolist()
        assert upper[1:] == lower[1:]
        assert upper[0] == (spare_value(fmt) if fmt.spare else lower[0])
    assert fmt.symmetric == (fmt.signed and (not fmt.spare or spare_value(fmt) in magnitudes(fmt)))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
def test_run_of_one_is_an_integer(bits, signed):
    fmt = Format(bits, signed, 1)
    assert fmt.significands[: 1 << fmt.magnitude_bits].tolist() == list(range(1 << fmt.magnitude_bits))


@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, ml_dtypes.float4_e2m1fn), (6, ml_dtypes.float6_e2m3fn)], ids=["e2m1", "e2m3"]
)
def test_run_of_two_is_a_minifloat(bits, dtype):
    table = np.arange(1 << bits, dtype=np.uint8).view(dtype).astype(np.float64)
    assert (Format(bits, max_run=2).values * 2).tolist() == table.tolist()


@pytest.mark.parametrize("m", range(2, 9))
def test_run_of_two_is_e2_by_its_definition(m):
    f = m - 2
    expected = []
    for code in range(1 << m):
        exponent, fraction = code >> f, Fraction(code & ((1 << f) - 1), 1 << f)
        expected.append(fraction if exponent == 0 else (1 + fraction) * 2 ** (exponent - 1))
    # Twice as large with the usual bias of 1: subnormals and the first binade are the linear region, up to 2.
    assert magnitudes(Format(m, False, 2)).tolist() == [v / 2 for v in expected]


def test_fields():
    # The bit layouts drawn in docs/format.md, and the ends of the run.
    assert Format(8).fields(0b1_110_1010) == Fields("1", "11", "0", "1010")
    assert Format(8).fields(0b0_0_101010) == Fields("0", "", "", "0101010")
    assert Format(4, signed=False).fields(0b1111) == Fields("", "1111", "", "")
    assert Format(4, max_run=2).fields(0b0111) == Fields("0", "11", "", "1")
    assert Format(4, max_run=2).fields(0b0101) == Fields("0", "1", "0", "1")
    assert Format(4, spare=True).fields(0b1000) == Fields("1", "", "", "000")


@each(FORMATS)
def test_fields_spell_the_code(fmt):
    for code in range(1 << fmt.bits):
        fields = fmt.fields(code)
        assert int("".join(dataclasses.astuple(fields)), 2) == code
        assert len(fields.sign) == fmt.signed
        assert len(fields.run) <= fmt.max_run
        assert fields.stop == ("0" if 0 < len(fields.run) < fmt.max_run else "")


def test_names_round_trip():
    names = [fmt.name for fmt in FORMATS]
    assert len(set(names)) == len(FORMATS)
    for fmt, name in zip(FORMATS, names, strict=True):
        assert Format.parse(name) == fmt
        assert str(fmt) == name


@pytest.mark.parametrize(
    ("fmt", "name"),
    [
        (Format(4), "s4"),
        (Format(4, signed=False), "u4"),
        (Format(4, max_run=2), "s4r2"),
        (Format(2, midrise=True), "s2mid"),
        (Format(3, spare=True), "s3spare"),
        (Format(2, spare=True), "s2spare"),
        (Format(8, False, 3), "u8r3"),
        (Format(4, max_run=2, spare=True), "s4r2spare"),
    ],
)
def test_short_names(fmt, name):
    assert fmt.name == name


@each(FORMATS)
def test_repr_evaluates_back(fmt):
    assert eval(repr(fmt)) == fmt


def test_equality_hash_and_pickle():
    assert Format(4) == Format(4, True, 3) != Format(4, True, 2)
    assert len({Format(4), Format(4, True, 3), Format(4, spare=True)}) == 2
    fmt = Format(4, spare=True)
    assert pickle.loads(pickle.dumps(fmt)) == fmt
    assert fmt.values[8] == 2.5  # a filled cache is not part of the identity
    assert pickle.loads(pickle.dumps(fmt)) == fmt == Format(4, spare=True)


def test_frozen():
    fmt = Format(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.bits = 5
    for table in (fmt.values, fmt.significands):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1


def test_variants():
    names = [fmt.name for fmt in variants(4)]
    assert names == ["s4r1", "s4r2", "s4", "s4r1mid", "s4r2mid", "s4mid", "s4r1spare", "s4r2spare", "s4spare"]
    assert [fmt.name for fmt in variants(2)] == ["s2", "s2mid", "s2spare"]
    assert [fmt.name for fmt in variants(3, signed=False)] == ["u3r1", "u3r2", "u3"]
    assert [len(variants(bits)) for bits in WIDTHS] == [3, 6, 9, 12, 15, 18, 21]
    assert [len(variants(bits, signed=False)) for bits in WIDTHS] == list(WIDTHS)


@pytest.mark.parametrize("run", [1, 2, 3])
def test_where_the_spare_level_lies(run):
    # Between the two largest levels for r = 2 and 3, above them for r = 1.
    levels = Format(4, max_run=run, spare=True).levels.tolist()
    assert levels.index(2.5) == len(levels) - (1 if run == 1 else 2)


def test_spare_of_two_bits():
    # 5/2 is no multiple of the step, which is 1.
    fmt = Format(2, spare=True)
    assert fmt.values.tolist() == [0, 1, 2, -1] and fmt.significands.tolist() == [0, 1, 2, -1] and fmt.step == 1
    assert Format.parse("s2spare") == Format.parse("s2r1spare") == fmt and fmt.tie_losers == {0b10}
    # 1.5 goes to 1 and not to the spare level; the others are as ever, to the even code.
    codes = fmt.encode([-9, -0.5, -0.0, 0.5, 1.5, np.nextafter(1.5, 2), 9])
    assert fmt.decode(codes).tolist() == [-1, 0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Format(1), "bits must be an integer from 2 to 8, not 1"),
        (lambda: Format(9), "bits must be an integer from 2 to 8, not 9"),
        (lambda: Format(4.0), "bits must be an integer from 2 to 8, not 4.0"),
        (lambda: Format(True), "bits must be an integer from 2 to 8, not True"),
        (lambda: Format("4"), "bits must be an integer from 2 to 8, not '4'"),
        (lambda: Format(4, signed=1), "signed must be True or False, not 1"),
        (lambda: Format(4, midrise=None), "midrise must be True or False, not None"),
        (lambda: Format(4, spare="yes"), "spare must be True or False, not 'yes'"),
        (lambda: Format(4, max_run=0), "max_run for s4 must be an integer from 1 to 3, not 0"),
        (lambda: Format(4, max_run=4), "max_run for s4 must be an integer from 1 to 3, not 4"),
        (lambda: Format(4, False, 5), "max_run for u4 must be an integer from 1 to 4, not 5"),
        (lambda: Format(4, max_run=2.0), "max_run for s4 must be an integer from 1 to 3, not 2.0"),
        (lambda: Format(4, False, midrise=True), "midrise=True needs signed=True"),
        (lambda: Format(4, False, spare=True), "spare=True needs signed=True and midrise=False"),
        (lambda: Format(4, midrise=True, spare=True), "spare=True needs signed=True and midrise=False"),
        (lambda: Format(4).fields(16), "codes of s4 are 0 to 15, not 16"),
        (lambda: Format(4).fields(-1), "codes of s4 are 0 to 15, not -1"),
        (lambda: Format.parse("s9"), "bits must be an integer from 2 to 8, not 9"),
        (lambda: Format.parse("s4r4"), "max_run for s4 must be an integer from 1 to 3, not 4"),
        (lambda: Format.parse("u4mid"), "midrise=True needs signed=True"),
        (lambda: variants(1), "bits must be an integer from 2 to 8, not 1"),
    ],
)
def test_errors_quote_the_value(make, message):
    with pytest.raises(DyBitError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name", ["", "4", "s", "x4", "S4", "s4r", "s4 ", "s4\n", "s4midspare", "s4sparer2", "s-4", None, 4]
)
def test_parse_rejects(name):
    with pytest.raises(DyBitError) as error:
        Format.parse(name)
    assert repr(name) in str(error.value)
