"""Tables of the rival number formats: one function a format, from its parameters to a codebook."""

from __future__ import annotations

from itertools import product
from math import ldexp
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dybit.errors import DyBitError
from dybit.formats.codebook import Table

Special = Literal["none", "nan", "ieee"]
_SUFFIX: dict[str, str] = {"none": "", "nan": "fn", "ieee": "ieee"}

# Dettmers et al., QLoRA, 2023, appendix E: published as float32, so the last digits are those of float32 arithmetic.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def integer(bits: int) -> Table:
    """Returns the symmetric integer ``int4``, …: two's complement without its most negative code.

    Args:
        bits: Width of a code, 2 to 8.

    Returns:
        Values -(2^(bits-1) - 1) … 2^(bits-1) - 1; the code of -2^(bits-1) is not used (NaN).

    Raises:
        DyBitError: ``bits`` is out of range.

    Example:
        >>> integer(3).levels.tolist()
        [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    """
    values = _twos_complement(bits)
    values[1 << (bits - 1)] = np.nan
    return Table(f"int{bits}", values)


def integer_full(bits: int) -> Table:
    """Returns the integer ``int4full``, …: all of two's complement, -2^(bits-1) … 2^(bits-1) - 1.

    Args:
        bits: Width of a code, 2 to 8.

    Raises:
        DyBitError: ``bits`` is out of range.
    """
    return Table(f"int{bits}full", _twos_complement(bits))


def unsigned_integer(bits: int) -> Table:
    """Returns the unsigned integer ``uint4``, …: 0 … 2^bits - 1.

    Args:
        bits: Width of a code, 2 to 8.

    Raises:
        DyBitError: ``bits`` is out of range.
    """
    check_integer("bits", bits, 2, 8)
    return Table(f"uint{bits}", np.arange(1 << bits))


def integer_with_zero(bits: int, zero_point: int) -> Table:
    """Returns one codebook of ``integer_asymmetric``, ``int4z3``, …: q - zero_point for codes q.

    Args:
        bits: Width of a code, 2 to 8.
        zero_point: The code of zero, 0 to 2^bits - 1.

    Raises:
        DyBitError: A parameter is out of range.
    """
    check_integer("bits", bits, 2, 8)
    check_integer("zero_point", zero_point, 0, (1 << bits) - 1)
    return Table(f"int{bits}z{zero_point}", np.arange(1 << bits) - zero_point)


def minifloat(exponent_bits: int, mantissa_bits: int, signed: bool = True, special: Special = "none") -> Table:
    """Returns a small binary float with subnormals and the usual bias, 2^(exponent_bits - 1) - 1.

    The name ``e2m1`` (unsigned ``ue2m2``) means that every code is a number, as in OCP's FP4 and FP6 (``ml_dtypes``:
    ``float4_e2m1fn``, ``float6_e2m3fn``, ``float6_e3m2fn``). The 8-bit types spend codes on NaN and infinity, which
    quantization never produces, so those codes are not used here: ``e4m3fn`` is ``float8_e4m3fn`` (OCP's E4M3);
    ``e5m2ieee``, ``e4m3ieee`` and ``e3m4ieee`` are ``float8_e5m2`` (OCP's E5M2), ``float8_e4m3`` and ``float8_e3m4``.

    Args:
        exponent_bits: 1 to 7.
        mantissa_bits: 0 to 7.
        signed: Whether the top bit is a sign.
        special: ``"none"``; ``"nan"``: the all-ones magnitude is NaN; ``"ieee"``: the largest exponent is infinity
            and NaN. The latter two need a signed format of 8 bits.

    Raises:
        DyBitError: A parameter is out of range, the width is not 2 to 8, or the special codes do not exist there.

    Example:
        >>> minifloat(2, 1).values[:8].tolist()
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    check_integer("exponent_bits", exponent_bits, 1, 7)
    check_integer("mantissa_bits", mantissa_bits, 0, 7)
    name = f"{'' if signed else 'u'}e{exponent_bits}m{mantissa_bits}"
    bits = signed + exponent_bits + mantissa_bits
    if not 2 <= bits <= 8:
        raise DyBitError(f"a minifloat has 2 to 8 bits, {name} would have {bits}")
    if special not in _SUFFIX or (special != "none" and not (signed and bits == 8)):
        raise DyBitError(f'special must be "none", or "nan" or "ieee" in a signed format of 8 bits, not {special!r}')
    fields = np.arange(1 << (exponent_bits + mantissa_bits))
    exponent, fraction = fields >> mantissa_bits, fields & ((1 << mantissa_bits) - 1)
    significand = fraction + np.where(exponent > 0, 1 << mantissa_bits, 0)
    bias = (1 << (exponent_bits - 1)) - 1
    magnitudes = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    if special == "nan":
        magnitudes[-1] = np.nan
    elif special == "ieee":
        magnitudes[exponent == exponent.max()] = np.nan
    return Table(name + _SUFFIX[special], _with_sign(magnitudes, signed))


def normal_float(bits: int) -> Table:
    """Returns NormalFloat ``nf4``, … (Dettmers et al., QLoRA, NeurIPS 2023): quantiles of the normal distribution.

    The published NF4, and the same construction at the other widths: with δ = (1/2^(bits+1) + 1/(2^(bits+1) - 2)) / 2,
    2^(bits-1) positive values are the quantiles at evenly spaced probabilities from 1 - δ down to, not including, 1/2;
    the 2^(bits-1) - 1 negative ones likewise; and zero is exact. All are divided by the largest and rounded to
    float32; the codes are in increasing order of value.

    Args:
        bits: Width of a code, 2 to 8.

    Raises:
        DyBitError: ``bits`` is out of range.
    """
    check_integer("bits", bits, 2, 8)
    return Table(f"nf{bits}", _NF4 if bits == 4 else normal_quantiles(bits))


def normal_quantiles(bits: int) -> NDArray[np.float32]:
    """Returns the values of :func:`normal_float` by their construction: float32 of shape (2**bits,)."""
    half = 1 << (bits - 1)
    edge = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(edge, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in np.linspace(edge, 0.5, half)[:-1]]
    values = np.array(sorted([*negative, 0.0, *positive]))
    rounded: NDArray[np.float32] = (values / values[-1]).astype(np.float32)
    return rounded


def posit(bits: int, es: int) -> Table:
    """Returns the posit ``posit8es2``, … (Gustafson and Yonemoto, 2017): sign, regime, exponent and fraction.

    Encoding goes to the nearest value, as everywhere in dybit; the posit standard rounds the bit string instead,
    which differs where the regime changes, and never rounds to zero.

    Args:
        bits: Width of a code, 2 to 8.
        es: Exponent bits, 0 to 3 (2 in the posit standard of 2022).

    Returns:
        Values in two's complement order; NaR (the code of -2^(bits-1)) is not used.

    Raises:
        DyBitError: A parameter is out of range.

    Example:
        >>> posit(4, 1).values[:8].tolist()
        [0.0, 0.0625, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0]
    """
    check_integer("bits", bits, 2, 8)
    check_integer("es", es, 0, 3)
    values = np.full(1 << bits, np.nan)
    values[0] = 0.0
    for code in range(1, 1 << (bits - 1)):
        pattern = f"{code:0{bits - 1}b}"
        run = len(pattern) - len(pattern.lstrip(pattern[0]))
        regime = run - 1 if pattern[0] == "1" else -run
        rest = pattern[run + 1 :]  # the bit after the run ends it
        exponent = int("0" + rest[:es].ljust(es, "0"), 2)  # bits cut off by the width are zeros
        fraction = rest[es:]
        value = ldexp(1 + int("0" + fraction, 2) / (1 << len(fraction)), (regime << es) + exponent)
        values[code], values[-code] = value, -value
    return Table(f"posit{bits}es{es}", values)


def flint(bits: int, signed: bool = True) -> Table:
    """Returns flint ``flint4``, ``uflint4``, … (Guo et al., ANT, MICRO 2022), encoded by the first one.

    With the top magnitude bit 0 the rest is an integer; with 1, the zeros after it count the exponent upwards and
    the bits after the next one are the fraction. In 4 unsigned bits:
    ``0xxx`` 0 … 7, ``11xx`` 8 … 14, ``101x`` 16 and 24, ``1001`` 32, ``1000`` 64.

    Args:
        bits: Width of a code, 3 to 8 (signed) or 2 to 8.
        signed: Whether the top bit is a sign.

    Raises:
        DyBitError: ``bits`` is out of range; the authors define at least 2 magnitude bits.
    """
    name = "flint" if signed else "uflint"
    check_integer("bits", bits, 2 + signed, 8, f" of {name}")
    m = bits - signed
    top = 1 << (m - 1)
    magnitudes = np.arange(1 << m, dtype=np.float64)
    for rest in range(top):
        zeros = m - 1 - rest.bit_length()
        fraction_bits = max(m - 2 - zeros, 0)
        fraction = rest & ((1 << fraction_bits) - 1)
        magnitudes[top + rest] = ldexp(1 + fraction / (1 << fraction_bits), m - 1 + zeros)
    return Table(f"{name}{bits}", _with_sign(magnitudes, signed))


def power_of_two(bits: int, signed: bool = True) -> Table:
    """Returns powers of two ``pot4``, ``upot4``, … (Miyashita et al., 2016): zero, and 1, 1/2, 1/4, … downwards.

    Args:
        bits: Width of a code, 2 to 8.
        signed: Whether the top bit is a sign.

    Raises:
        DyBitError: ``bits`` is out of range.

    Example:
        >>> power_of_two(3).values[:4].tolist()
        [0.0, 0.25, 0.5, 1.0]
    """
    check_integer("bits", bits, 2, 8)
    count = 1 << (bits - signed)
    magnitudes = np.ldexp(1.0, np.arange(count) - (count - 1))
    magnitudes[0] = 0.0
    return Table(f"{'' if signed else 'u'}pot{bits}", _with_sign(magnitudes, signed))


def additive_power_of_two(bits: int, signed: bool = True) -> Table:
    """Returns sums of powers of two ``apot4``, ``uapot4``, … (Li et al., APoT, ICLR 2020) with base k = 2.

    m = 2n magnitude bits are n terms of two bits; term i is 0, 2^-(1+i), 2^-(1+i+n) or 2^-(1+i+2n). An odd bit is one
    more term, 0 or 2^-(2n+1), and the smallest power of the others moves down by one, as in the authors' code. A code
    is its terms in order, the first on top. The paper's factor γ, which makes the largest value 1, is left to the
    scale, so that the values stay exact.

    Args:
        bits: Width of a code, 2 to 8.
        signed: Whether the top bit is a sign, as for weights.

    Raises:
        DyBitError: ``bits`` is out of range.
    """
    check_integer("bits", bits, 2, 8)
    n, odd = divmod(bits - signed, 2)
    exponents = [(1 + i, 1 + i + n, 1 + i + 2 * n + odd) for i in range(n)] + [(2 * n + 1,)] * odd
    terms = [(0.0, *(2.0**-e for e in term)) for term in exponents]
    magnitudes = np.array([sum(choice) for choice in product(*terms)])
    return Table(f"{'' if signed else 'u'}apot{bits}", _with_sign(magnitudes, signed))


def adaptive_float(bits: int, exponent_bits: int) -> Table:
    """Returns one codebook of ``adaptivfloat``, ``adaptivfloat4e2``, …, its largest exponent 0.

    Args:
        bits: Width of a code, 2 to 8.
        exponent_bits: 1 to ``bits`` - 1.

    Raises:
        DyBitError: A parameter is out of range.
    """
    check_integer("bits", bits, 2, 8)
    check_integer("exponent_bits", exponent_bits, 1, bits - 1)
    mantissa_bits = bits - 1 - exponent_bits
    fields = np.arange(1 << (bits - 1))
    fraction = (fields & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    magnitudes = np.ldexp(1 + fraction, (fields >> mantissa_bits) - ((1 << exponent_bits) - 1))
    magnitudes[0] = 0.0  # no denormals: the slot of the smallest magnitude is the zero
    return Table(f"adaptivfloat{bits}e{exponent_bits}", _with_sign(magnitudes, True))


def check_integer(name: str, value: object, low: int, high: int, context: str = "") -> None:
    """Checks one integer parameter.

    Raises:
        DyBitError: ``value`` is not an integer from ``low`` to ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise DyBitError(f"{name}{context} must be an integer from {low} to {high}, not {value!r}")


def _twos_complement(bits: int) -> NDArray[np.float64]:
    check_integer("bits", bits, 2, 8)
    codes = np.arange(1 << bits, dtype=np.float64)
    return np.where(codes < 1 << (bits - 1), codes, codes - (1 << bits))


def _with_sign(magnitudes: NDArray[np.float64], signed: bool) -> NDArray[np.float64]:
    """Puts a sign bit on top. Adding 0 turns the -0.0 of negative zero's code into 0.0, as Format decodes it."""
    return np.concatenate((magnitudes, 0.0 - magnitudes)) if signed else magnitudes
