"""Formats by name: what each family holds, and how names are read."""

import subprocess
import sys
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from dybit.errors import DyBitError
from dybit.formats import catalogue, tables
from dybit.formats.format import Format, variants
from dybit.formats.tables import integer_with_zero

WIDTHS = range(2, 9)
NAMES = catalogue.names()


def contains(family, levels):
    """Whether a codebook of the family has exactly these levels, up to a positive scale."""
    wanted = levels / np.abs(levels).max()
    return any(np.array_equal(book.levels / np.abs(book.levels).max(), wanted) for book in family.books)


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


def test_imports_only_numpy():
    code = (
        "import sys, dybit.formats.catalogue, dybit.formats.lloyd_max\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'scipy', 'ml_dtypes')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: catalogue.integer_asymmetric(0), "not 0"),
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
