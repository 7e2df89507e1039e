"""The DyBit number format: code ↔ value ↔ significand for every width and variant (docs/format.md is normative)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from dybit.errors import DyBitError
from dybit.formats.codebook import Codebook

MIN_BITS, MAX_BITS = 2, 8
_NAME = re.compile(r"([su])(\d+)(?:r(\d+))?(mid|spare)?")


@dataclass(frozen=True)
class Fields:
    """The bit fields of one code, as strings of 0 and 1, most significant first.

    Attributes:
        sign: ``""`` for unsigned formats.
        run: The leading ones of the exponent.
        stop: The zero that ends the run; ``""`` where the run has its longest length.
        fraction: The rest.
    """

    sign: str
    run: str
    stop: str
    fraction: str


@dataclass(frozen=True, repr=False)
class Format(Codebook):
    """A DyBit format.

    Args:
        bits: Width of a code, 2 to 8.
        signed: Whether the top bit is a sign.
        max_run: Longest run of leading ones, 1 to the number m of magnitude bits. None means m, the paper's DyBit;
            1 is a sign-magnitude integer.
        midrise: Every code stands for the middle of its step and there is no zero; signed formats only.
        spare: The code of negative zero stands for +5/2, at 2 bits for +2; signed mid-tread formats only.

    Raises:
        DyBitError: A parameter is out of range or the combination does not exist.

    Example:
        >>> Format(4, max_run=2).values[:8].tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
        >>> Format.parse("s4r2").encode([0.3, -9.0]).tolist()
        [1, 15]
    """

    bits: int
    signed: bool = True
    max_run: int = None  # type: ignore[assignment]  # None is replaced by m, so that readers always see an integer
    midrise: bool = False
    spare: bool = False

    def __post_init__(self) -> None:
        """Checks the parameters and resolves ``max_run``."""
        _check_integer("bits", self.bits, MIN_BITS, MAX_BITS, "")
        for name in ("signed", "midrise", "spare"):
            if not isinstance(getattr(self, name), bool):
                raise DyBitError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.max_run is None:
            object.__setattr__(self, "max_run", self.magnitude_bits)
        _check_integer("max_run", self.max_run, 1, self.magnitude_bits, f" for {'su'[not self.signed]}{self.bits}")
        if self.midrise and not self.signed:
            raise DyBitError("midrise=True needs signed=True: an unsigned format must have a zero")
        if self.spare and (not self.signed or self.midrise):
            raise DyBitError("spare=True needs signed=True and midrise=False")

    @property
    def magnitude_bits(self) -> int:
        """The number m of bits beside the sign."""
        return self.bits - self.signed

    @cached_property
    def name(self) -> str:
        """Short name that :meth:`parse` reads back, such as ``s4``, ``u8r3``, ``s4r2mid`` or ``s3spare``."""
        run = "" if self.max_run == self.magnitude_bits else f"r{self.max_run}"
        return f"{'s' if self.signed else 'u'}{self.bits}{run}{'mid' * self.midrise}{'spare' * self.spare}"

    @classmethod
    def parse(cls, name: str) -> Format:
        """Returns the format of a short name.

        Raises:
            DyBitError: ``name`` is not a short name, or one of a format that does not exist.
        """
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise DyBitError(f"format name must look like s4, u8r3, s2mid or s4r2spare, not {name!r}")
        sign, bits, run, kind = match.groups()
        return cls(int(bits), sign == "s", int(run) if run else None, kind == "mid", kind == "spare")  # type: ignore[arg-type]

    @cached_property
    def significands(self) -> NDArray[np.int64]:
        """Significand of every code, ``value / step``: int64 of shape (2**bits,)."""
        magnitudes = np.arange(1 << self.magnitude_bits)
        width = self.magnitude_bits + self.midrise  # mid-rise: append a 1 and read as one bit more
        table = _magnitude_significands(width, self.max_run)[magnitudes << 1 | 1 if self.midrise else magnitudes]
        if self.signed:
            table = np.concatenate((table, -table))
        if self.spare:
            table[1 << self.magnitude_bits] = 5 << self.magnitude_bits >> 2  # 5/2, cut to a multiple of the step
        table.flags.writeable = False
        return table

    @property
    def step(self) -> float:
        """Value of one significand unit: 2^-(m-1), or 2^-m for mid-rise."""
        return 2.0 ** -(self.magnitude_bits + self.midrise - 1)

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """Value of every code: float64 of shape (2**bits,), exact."""
        table: NDArray[np.float64] = self.significands * np.float64(self.step)
        table.flags.writeable = False
        return table

    @property
    def max_significand(self) -> int:
        """The largest absolute significand; decides the integer width that a kernel or datapath needs."""
        return int(np.abs(self.significands).max())

    @property
    def tie_losers(self) -> frozenset[int]:
        """The spare level's code: a tie with it goes to the other code."""
        return frozenset({1 << self.magnitude_bits} if self.spare else ())

    def fields(self, code: int) -> Fields:
        """Returns the bit fields of a code; the spare level's code has only a sign and a fraction of zeros.

        Raises:
            DyBitError: ``code`` is out of range.
        """
        if not 0 <= code < 1 << self.bits:
            raise DyBitError(f"codes of {self.name} are 0 to {(1 << self.bits) - 1}, not {code}")
        pattern = format(code, f"0{self.bits}b")
        sign, magnitude = (pattern[0], pattern[1:]) if self.signed else ("", pattern)
        run = min(len(magnitude) - len(magnitude.lstrip("1")), self.max_run)
        stop = magnitude[run : run + 1] if 0 < run < self.max_run else ""
        return Fields(sign, magnitude[:run], stop, magnitude[run + len(stop) :])

    def __repr__(self) -> str:
        flags = "".join(f", {flag}=True" for flag in ("midrise", "spare") if getattr(self, flag))
        return f"Format(bits={self.bits}, signed={self.signed}, max_run={self.max_run}{flags})"

    def __str__(self) -> str:
        return self.name


def variants(bits: int, signed: bool = True) -> tuple[Format, ...]:
    """Returns every variant of a width, in the order in which checkpoints number them.

    First the plain ones by ``max_run``, then mid-rise, then spare: nine for 4-bit signed codes, three for 2-bit ones.

    Raises:
        DyBitError: ``bits`` is not 2 to 8.
    """
    m = Format(bits, signed).magnitude_bits
    runs = range(1, m + 1)
    plain = [Format(bits, signed, run) for run in runs]
    middle = [Format(bits, signed, run, midrise=True) for run in runs if signed]
    spare = [Format(bits, signed, run, spare=True) for run in runs if signed]
    return (*plain, *middle, *spare)


@cache
def _magnitude_significands(m: int, max_run: int) -> NDArray[np.int64]:
    """Significands of all m-bit magnitudes in units of 2^-(m-1) (docs/format.md, section 2)."""
    table = np.empty(1 << m, dtype=np.int64)
    for code in range(1 << m):
        run = 0
        while run < max_run and code >> (m - 1 - run) & 1:
            run += 1
        if run == 0:
            table[code] = code
        else:
            fraction_bits = m - run if run == max_run else m - 1 - run
            fraction = code & ((1 << fraction_bits) - 1)
            # 2^(run-1) · (1 + fraction / 2^f), in units of 2^-(m-1)
            table[code] = ((1 << fraction_bits) + fraction) << (m - 2 + run - fraction_bits)
    return table


def _check_integer(name: str, value: object, low: int, high: int, context: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise DyBitError(f"{name}{context} must be an integer from {low} to {high}, not {value!r}")
