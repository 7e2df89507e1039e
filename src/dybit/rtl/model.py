"""The hardware in integers: what every component of dybit.rtl must compute, in NumPy.

All numbers are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dybit.accelerator.datapath import Mode, datapath_factor
from dybit.errors import DyBitError
from dybit.formats.format import MIN_BITS, Format

Integers = NDArray[np.int64]
MULTIPLIER_BITS = 16  # two's complement: a scale may be negative
SHIFT_BITS = 6
FRACTION_BITS = 8  # of the fixed-point value that enters the encoder


def integers(fmt: Format) -> Integers:
    """Returns what the datapath makes of every code: value / 2^-(container - 1) for any container, (2**bits,) int64.

    The datapath's unit belongs to the container; see :func:`scaled` for codes that are narrower than theirs.
    """
    table: Integers = fmt.significands * datapath_factor(fmt.signed, fmt.midrise)
    return table


def scaled(fmt: Format, container: int) -> Integers:
    """Returns the datapath's integer of every code of ``fmt`` when it rides in a container: (2**bits,) int64."""
    return integers(fmt) << (container - fmt.bits)


@dataclass(frozen=True)
class Variant:
    """The controls of a decoder beside the code.

    Attributes:
        signed: Whether the top bit is a sign.
        max_run: Longest run of leading ones.
        midrise: Whether a 1 is appended to the magnitude.
        spare: Whether negative zero stands for +5/2, in a container of 2 bits for +2.
    """

    signed: bool
    max_run: int
    midrise: bool
    spare: bool


def widen(fmt: Format, container: int) -> tuple[NDArray[np.uint8], Variant]:
    """Returns every code as it stands in its container, and the variant that the decoder is told.

    A narrower code is shifted up; mid-rise has its 1 appended on the way, after which it is a mid-tread code. A 2-bit
    code with a spare level becomes one of ``max_run=2`` without, which has its values: shifted up, its spare level
    would be 5/2 and not 2.

    Raises:
        DyBitError: ``container`` is narrower than the codes.
    """
    if container < fmt.bits:
        raise DyBitError(f"container must be at least the {fmt.bits} bits of {fmt}, not {container}")
    codes = np.arange(1 << fmt.bits)
    room = container - fmt.bits
    if not room:
        return codes.astype(np.uint8), Variant(fmt.signed, fmt.max_run, fmt.midrise, fmt.spare)
    if fmt.spare and fmt.bits == MIN_BITS:
        same = Format(container, max_run=2)
        return same.encode(fmt.values), Variant(True, 2, False, False)
    wide = (codes << 1 | fmt.midrise) << (room - 1)
    return wide.astype(np.uint8), Variant(fmt.signed, fmt.max_run, False, fmt.spare)


def pack_fields(codes: ArrayLike, bits: int) -> Integers:
    """Packs containers into words, the first one lowest: (..., count) → (...)."""
    array = np.asarray(codes, dtype=np.int64)
    packed: Integers = (array << (bits * np.arange(array.shape[-1]))).sum(axis=-1)
    return packed


@dataclass(frozen=True)
class Requantizer:
    """One output channel's way from partial sum to code: ``value = (sum + bias) · multiplier / 2^shift / 2^8``.

    Args:
        bias: Added to the partial sum, in its unit.
        multiplier: 16-bit two's complement.
        shift: 0 to 63.

    Raises:
        DyBitError: A number does not fit.
    """

    bias: int
    multiplier: int
    shift: int

    def __post_init__(self) -> None:
        """Checks the ranges."""
        limit = 1 << (MULTIPLIER_BITS - 1)
        if not -limit <= self.multiplier < limit:
            raise DyBitError(f"multiplier must be {-limit} to {limit - 1}, not {self.multiplier}")
        if not 0 <= self.shift < 1 << SHIFT_BITS:
            raise DyBitError(f"shift must be 0 to {(1 << SHIFT_BITS) - 1}, not {self.shift}")

    @classmethod
    def of(cls, ratio: float | Fraction, bias: int = 0) -> Requantizer:
        """Returns the requantizer that multiplies partial sums by ``ratio`` to get values of the output format.

        ``ratio`` is ``scale_x · scale_w · unit_x · unit_w / scale_y``, the units being 2^-(container - 1). It is
        rounded to 15 significant bits; ratios of up to 15 bits are exact.

        Raises:
            DyBitError: ``ratio`` is out of reach of multiplier and shift.
        """
        exact = Fraction(ratio) * (1 << FRACTION_BITS)
        top = 1 << (MULTIPLIER_BITS - 1)
        for shift in range((1 << SHIFT_BITS) - 1, -1, -1):
            multiplier = round(exact * (1 << shift))
            if -top <= multiplier < top:
                if multiplier == 0 and ratio:
                    break
                return cls(bias, multiplier, shift)
        raise DyBitError(f"ratio must be within reach of {MULTIPLIER_BITS} bits shifted by 0 to 63, not {ratio}")


def encode(sums: ArrayLike, parameters: Requantizer, fmt: Format, relu: bool = False) -> NDArray[np.uint8]:
    """Returns the codes that the column's requantizer and encoder make of partial sums, exactly.

    Args:
        sums: Integers of any shape.
        parameters: Bias, multiplier and shift.
        fmt: Format of the output, mid-tread without spare.
        relu: Whether negative values become zero.

    Raises:
        DyBitError: ``fmt`` is mid-rise or has a spare level.
    """
    check_output(fmt)
    array = np.asarray(sums).astype(object)
    unit = Fraction(1, 1 << (parameters.shift + FRACTION_BITS))
    levels = [Fraction(float(value)) for value in fmt.levels]
    codes = np.empty(array.shape, dtype=np.uint8)
    for index in np.ndindex(array.shape):
        value = (int(array[index]) + parameters.bias) * parameters.multiplier * unit
        codes[index] = _nearest(max(value, Fraction(0)) if relu else value, levels, fmt)
    return codes


def _nearest(value: Fraction, levels: list[Fraction], fmt: Format) -> int:
    """The code of the level nearest to ``value``, the even one of two."""
    pairs = (
        (abs(level - value), int(code) & 1, int(code)) for level, code in zip(levels, fmt.level_codes, strict=True)
    )
    return min(pairs)[2]


def check_output(fmt: Format) -> None:
    """Checks that the encoder can make codes of ``fmt``.

    Raises:
        DyBitError: ``fmt`` is mid-rise or has a spare level, which are variants of weights.
    """
    if fmt.midrise or fmt.spare:
        raise DyBitError(f"format of outputs must be mid-tread without a spare level, not {fmt}")


def pe_sums(activations: ArrayLike, weights: ArrayLike, mode: Mode) -> Integers:
    """Returns the lanes that a PE adds in one cycle.

    Args:
        activations: Integers of the activations in a field, shape (..., mode.activations).
        weights: Integers of the weights, shape (..., mode.activations, mode.lanes).
        mode: The width pair.

    Returns:
        Sums, shape (..., mode.lanes).
    """
    left, right = np.asarray(activations, dtype=np.int64), np.asarray(weights, dtype=np.int64)
    if left.shape[-1] != mode.activations or right.shape[-2:] != (mode.activations, mode.lanes):
        raise DyBitError(f"operands of {mode} have the shapes {left.shape} and {right.shape}")
    sums: Integers = (left[..., :, None] * right).sum(axis=-2)
    return sums
