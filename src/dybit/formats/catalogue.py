"""Formats by name: families of codebooks, the parser of their names, and the ones that a comparison shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import cache, partial
from typing import Literal

from dybit.errors import DyBitError
from dybit.formats import tables
from dybit.formats.codebook import Codebook, Family
from dybit.formats.format import MAX_BITS, MIN_BITS, Format, variants
from dybit.formats.scaling import ScaleType

Kind = Literal["all", "plain", "midrise", "spare"]
_KIND_SUFFIX: dict[str, str] = {"all": "", "plain": "plain", "midrise": "mid", "spare": "spare"}
_MAX_ZERO_POINTS = 64
_MAX_ADAPTIVE_EXPONENT = 5
_Maker = Callable[[], Family]


def dybit(bits: int, signed: bool = True, kind: Kind = "all") -> Family:
    """Returns DyBit's variants of a width as a family, in the order of :func:`dybit.formats.format.variants`.

    Args:
        bits: Width of a code, 2 to 8.
        signed: Whether the top bit is a sign.
        kind: ``"all"`` variants (``dybit4``, unsigned ``udybit4``), or only the ``"plain"`` (``dybit4plain``),
            ``"midrise"`` (``dybit4mid``) or ``"spare"`` (``dybit4spare``) ones.

    Raises:
        DyBitError: A parameter is out of range, or there is no such variant of this width.

    Example:
        >>> [book.name for book in dybit(3, kind="spare").books]
        ['s3r1spare', 's3spare']
    """
    if kind not in _KIND_SUFFIX:
        raise DyBitError(f"kind must be one of {', '.join(_KIND_SUFFIX)}, not {kind!r}")
    books = tuple(book for book in variants(bits, signed) if kind in ("all", _kind(book)))
    if not books:
        raise DyBitError(f"there is no {kind} variant of bits={bits}, signed={signed}")
    return Family(f"{'' if signed else 'u'}dybit{bits}{_KIND_SUFFIX[kind]}", books)


def integer_asymmetric(bits: int) -> Family:
    """Returns integers with a zero point, ``int4asym``, …: the codebooks q - z for codes q and zero points z.

    Args:
        bits: Width of a code, 2 to 8. Up to 6 bits every z from 0 to 2^bits - 1 is a codebook; at 7 and 8 bits 64
            evenly spaced ones are, ends included, which costs at most two steps at either end of the range.

    Raises:
        DyBitError: ``bits`` is out of range.
    """
    tables.check_integer("bits", bits, MIN_BITS, MAX_BITS)
    return Family(f"int{bits}asym", tuple(tables.integer_with_zero(bits, zero) for zero in _zero_points(bits)))


def adaptivfloat(bits: int) -> Family:
    """Returns AdaptivFloat, ``adaptivfloat4``, … (Tambe et al., DAC 2020): floats with a power-of-two scale.

    The exponent bias of the paper, one a tensor, is the scale; there are no denormals, and the slot of the smallest
    magnitude is the zero. The paper tries exponent widths by hand; here they are the codebooks of the family, up to 5
    (more than float16's range is of no use to a tensor).

    Args:
        bits: Width of a code, 2 to 8.

    Raises:
        DyBitError: ``bits`` is out of range.
    """
    tables.check_integer("bits", bits, MIN_BITS, MAX_BITS)
    books = tuple(tables.adaptive_float(bits, width) for width in _exponent_widths(bits))
    return Family(f"adaptivfloat{bits}", books, scale="pow2")


def ant(bits: int, signed: bool = True) -> Family:
    """Returns ANT, ``ant4``, ``uant4``, … (Guo et al., MICRO 2022): the best of integer, flint and power of two.

    As in the authors' code the integer uses all of two's complement.

    Args:
        bits: Width of a code, 3 to 8 (signed) or 2 to 8.
        signed: Whether the codes have a sign.

    Raises:
        DyBitError: ``bits`` is out of range.
    """
    tables.check_integer("bits", bits, MIN_BITS + signed, MAX_BITS, f" of {'ant' if signed else 'uant'}")
    whole = tables.integer_full(bits) if signed else tables.unsigned_integer(bits)
    books = (whole, tables.flint(bits, signed), tables.power_of_two(bits, signed))
    return Family(f"{'' if signed else 'u'}ant{bits}", books)


def mxfp4() -> Family:
    """Returns MXFP4 (OCP Microscaling, 2023): E2M1 in groups of 32 with a power-of-two scale."""
    return Family("mxfp4", (tables.minifloat(2, 1),), scale="pow2", group_size=32)


def mxfp6(exponent_bits: int = 2) -> Family:
    """Returns MXFP6 (OCP Microscaling, 2023): ``mxfp6e2m3`` or ``mxfp6e3m2``.

    Args:
        exponent_bits: 2 or 3.

    Raises:
        DyBitError: ``exponent_bits`` is neither.
    """
    tables.check_integer("exponent_bits", exponent_bits, 2, 3, " of mxfp6")
    book = tables.minifloat(exponent_bits, 5 - exponent_bits)
    return Family(f"mxfp6{book.name}", (book,), scale="pow2", group_size=32)


def mxfp8(exponent_bits: int = 4) -> Family:
    """Returns MXFP8 (OCP Microscaling, 2023): ``mxfp8e4m3`` or ``mxfp8e5m2``, their NaN and infinity not used.

    Args:
        exponent_bits: 4 or 5.

    Raises:
        DyBitError: ``exponent_bits`` is neither.
    """
    tables.check_integer("exponent_bits", exponent_bits, 4, 5, " of mxfp8")
    book = tables.minifloat(exponent_bits, 7 - exponent_bits, special="nan" if exponent_bits == 4 else "ieee")
    return Family(f"mxfp8e{exponent_bits}m{7 - exponent_bits}", (book,), scale="pow2", group_size=32)


def nvfp4() -> Family:
    """Returns NVFP4 (NVIDIA, 2025): E2M1 in groups of 16 with an E4M3 scale."""
    return Family("nvfp4", (tables.minifloat(2, 1),), scale="e4m3", group_size=16)


def family(spec: str) -> Family:
    """Returns the format of a name.

    Args:
        spec: One of :func:`names`, or any name that :meth:`dybit.Format.parse` reads: a family of that one format.

    Returns:
        The family, the same object for the same name.

    Raises:
        DyBitError: The name is unknown; the message suggests the nearest ones.

    Example:
        >>> family("ant4").books
        (Table('int4full', 4 bits), Table('flint4', 4 bits), Table('pot4', 4 bits))
        >>> family("s4r2").name
        's4r2'
    """
    if not isinstance(spec, str):
        raise DyBitError(f"the name of a format must be a string, not {spec!r}")
    if spec in _catalogue():
        return _made(spec)
    if spec[:1] in ("s", "u") and spec[1:2].isdigit():
        return _made(Format.parse(spec).name)  # another spelling, such as s4r3 for s4, or an error that says more
    # Single zero points are known but never the name that somebody was looking for.
    near = get_close_matches(spec, [name for name in _catalogue() if "z" not in name], n=3, cutoff=0.4)
    hint = f"the nearest known ones are {', '.join(near)}" if near else "examples are dybit4, s4r2, int4, e2m1 and nf4"
    raise DyBitError(f"there is no format {spec!r}; {hint}")


def names() -> tuple[str, ...]:
    """Returns every name that :func:`family` knows, by width: families, and each of their codebooks alone."""
    return tuple(_catalogue())


@cache
def families(bits: int, signed: bool = True) -> tuple[Family, ...]:
    """Returns the formats of a width that a comparison shows by default, DyBit first.

    Formats that equal an integer at 2 bits (posit, AdaptivFloat, powers of two) are left out there.

    Args:
        bits: Width of a code, 2 to 8.
        signed: Formats for weights, or for activations that are never negative.

    Raises:
        DyBitError: ``bits`` is out of range.
    """
    tables.check_integer("bits", bits, MIN_BITS, MAX_BITS)
    m = bits - signed
    floats = [f"e{e}m{m - e}" for e in (2, 3) if m > e or (signed and m == e)]
    if not signed:
        shown = ["udybit{}", "u{}", "uint{}", *("u" + name for name in floats), "uflint{}", "upot{}", "uapot{}"]
        return tuple(family(name.format(bits)) for name in [*shown, "uant{}"])
    shown = ["dybit{}", "dybit{}plain", "dybit{}spare", "dybit{}mid", "s{}", "int{}", "int{}full", "int{}asym"]
    if bits == MIN_BITS:
        shown.append("nf{}")
    else:
        shown += [*floats, "nf{}", "posit{}es0", "posit{}es1", "adaptivfloat{}", "flint{}", "pot{}", "apot{}", "ant{}"]
    shown += {
        4: ["mxfp4", "nvfp4"],
        6: ["mxfp6e2m3", "mxfp6e3m2"],
        8: ["e4m3fn", "e5m2ieee", "posit8es2", "mxfp8e4m3", "mxfp8e5m2"],
    }.get(bits, [])
    return tuple(family(name.format(bits)) for name in shown)


@cache
def _made(name: str) -> Family:
    return _catalogue()[name]()


@cache
def _catalogue() -> dict[str, _Maker]:
    """Every name with the function that makes its family."""
    return {name: make for bits in range(MIN_BITS, MAX_BITS + 1) for name, make in _of_width(bits)}


def _of_width(bits: int) -> Iterator[tuple[str, _Maker]]:
    for signed in (True, False):
        yield from _dybit_names(bits, signed)
        yield from _signed_or_not(bits, signed)
    for name, book in ((f"int{bits}", tables.integer), (f"int{bits}full", tables.integer_full)):
        yield name, partial(_single, book, bits)
    yield f"uint{bits}", partial(_single, tables.unsigned_integer, bits)
    yield f"int{bits}asym", partial(integer_asymmetric, bits)
    yield f"nf{bits}", partial(_single, tables.normal_float, bits)
    for zero in _zero_points(bits):
        yield f"int{bits}z{zero}", partial(_single, tables.integer_with_zero, bits, zero)
    yield f"adaptivfloat{bits}", partial(adaptivfloat, bits)
    for width in _exponent_widths(bits):
        yield f"adaptivfloat{bits}e{width}", partial(_single, tables.adaptive_float, bits, width, scale="pow2")
    for es in range(4):
        yield f"posit{bits}es{es}", partial(_single, tables.posit, bits, es)
    if bits == 4:
        yield from (("mxfp4", mxfp4), ("nvfp4", nvfp4))
    if bits == 6:
        yield from (("mxfp6e2m3", partial(mxfp6, 2)), ("mxfp6e3m2", partial(mxfp6, 3)))
    if bits == 8:
        yield from (("mxfp8e4m3", partial(mxfp8, 4)), ("mxfp8e5m2", partial(mxfp8, 5)))


def _dybit_names(bits: int, signed: bool) -> Iterator[tuple[str, _Maker]]:
    sign = "" if signed else "u"
    formats = variants(bits, signed)
    for kind, suffix in _KIND_SUFFIX.items():
        if kind == "all" or any(_kind(book) == kind for book in formats):
            yield f"{sign}dybit{bits}{suffix}", partial(dybit, bits, signed, kind)  # type: ignore[arg-type]
    for book in formats:
        yield book.name, partial(_single, Format.parse, book.name)


def _signed_or_not(bits: int, signed: bool) -> Iterator[tuple[str, _Maker]]:
    """The rivals that exist with a sign and, prefixed with u, without."""
    sign = "" if signed else "u"
    for exponent_bits in range(1, min(bits - signed, 7) + 1):
        split = (exponent_bits, bits - signed - exponent_bits)
        yield f"{sign}e{split[0]}m{split[1]}", partial(_single, tables.minifloat, *split, signed)
        if signed and bits == 8:
            yield f"e{split[0]}m{split[1]}fn", partial(_single, tables.minifloat, *split, signed, "nan")
            yield f"e{split[0]}m{split[1]}ieee", partial(_single, tables.minifloat, *split, signed, "ieee")
    yield f"{sign}pot{bits}", partial(_single, tables.power_of_two, bits, signed)
    yield f"{sign}apot{bits}", partial(_single, tables.additive_power_of_two, bits, signed)
    if bits - signed >= 2:
        yield f"{sign}flint{bits}", partial(_single, tables.flint, bits, signed)
        yield f"{sign}ant{bits}", partial(ant, bits, signed)


def _single(build: Callable[..., Codebook], *parameters: object, scale: ScaleType | None = None) -> Family:
    """A family of one codebook, under the codebook's name."""
    book = build(*parameters)
    return Family(book.name, (book,), scale)


def _zero_points(bits: int) -> list[int]:
    count = min(1 << bits, _MAX_ZERO_POINTS)
    return [round(i * ((1 << bits) - 1) / (count - 1)) for i in range(count)]


def _exponent_widths(bits: int) -> range:
    return range(1, min(bits - 1, _MAX_ADAPTIVE_EXPONENT) + 1)


def _kind(book: Format) -> str:
    return "midrise" if book.midrise else "spare" if book.spare else "plain"
