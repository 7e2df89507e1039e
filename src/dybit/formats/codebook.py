"""Codebooks: 2^bits codes and their values, with exact array encoding (the oracle for every fast path)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dybit.errors import DyBitError
from dybit.formats.scaling import ScaleType


class Codebook(ABC):
    """A number format as a table from code to value.

    Formats differ only in their table; encoding to the nearest value, ties and saturation are the same for all,
    so that a comparison of two formats compares their values and nothing else.

    Attributes:
        bits: Width of a code, 1 to 8.
    """

    bits: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name, unique among formats."""

    @property
    @abstractmethod
    def values(self) -> NDArray[np.float64]:
        """Value of every code, float64 of shape (2**bits,); NaN marks a code that is not used."""

    @property
    def tie_losers(self) -> frozenset[int]:
        """Codes that lose every tie (DyBit's spare level)."""
        return frozenset()

    @cached_property
    def level_codes(self) -> NDArray[np.uint8]:
        """The codes that encoding produces, in increasing order of value: uint8 of shape (levels,).

        Of codes with equal values (zero and negative zero) the smallest is taken.
        """
        codes = np.flatnonzero(~np.isnan(self.values))
        order = codes[np.lexsort((codes, self.values[codes]))]
        values = self.values[order]
        first = np.concatenate(([True], values[1:] != values[:-1]))
        return order[first].astype(np.uint8)

    @cached_property
    def levels(self) -> NDArray[np.float64]:
        """The distinct values in increasing order: float64 of shape (levels,)."""
        return self.values[self.level_codes]

    @cached_property
    def midpoints(self) -> NDArray[np.float64]:
        """The midpoints of adjacent levels: float64 of shape (levels - 1,)."""
        return (self.levels[:-1] + self.levels[1:]) / 2

    @cached_property
    def ties_up(self) -> NDArray[np.bool_]:
        """Whether an input equal to a midpoint goes to the upper of its two levels: bool of shape (levels - 1,).

        The even code wins; where parity does not decide, the smaller code. A code in ``tie_losers`` never wins.
        Where float64 cannot hold a midpoint exactly there is no tie, and the rounding error decides.
        """
        lower, upper = self.level_codes[:-1].astype(int), self.level_codes[1:].astype(int)
        losers = sorted(self.tie_losers)

        def rank(codes: NDArray[np.int_]) -> NDArray[np.int_]:
            return np.isin(codes, losers) * 1024 + codes % 2 * 512 + codes

        a, b = self.levels[:-1], self.levels[1:]
        total = a + b
        error = (a - (total - (total - a))) + (b - (total - a))  # exact: Knuth's TwoSum
        return np.where(error == 0, rank(upper) < rank(lower), error < 0)

    def boundaries(self, dtype: type[np.floating] = np.float32) -> NDArray[np.floating]:
        """Thresholds t such that the level of x has index ``sum(t < x)``, ties included.

        A tie that goes up has its threshold one unit in the last place below the midpoint, so that a plain binary
        search (``bucketize``, ``searchsorted(side="left")``) is exact for inputs of ``dtype``.
        """
        middle = self.midpoints.astype(dtype)
        below = np.nextafter(middle, dtype(-np.inf))
        exact = middle == self.midpoints
        # A midpoint that dtype cannot represent has no tie; its largest representable lower neighbour is exact.
        rounded = np.where(middle > self.midpoints, below, middle)
        return np.where(exact, np.where(self.ties_up, below, middle), rounded)

    def encode(self, x: ArrayLike) -> NDArray[np.uint8]:
        """Returns the codes of the nearest values.

        Args:
            x: Real numbers of any shape, already divided by the scale. Infinities and magnitudes above the maximum
                saturate.

        Returns:
            Codes, uint8 of the shape of ``x``. A tie goes to the even code, or to the other code where one of the
            two is a spare level (docs/format.md, section 4).

        Raises:
            DyBitError: ``x`` holds NaN; the message names the first position.
        """
        array = np.asarray(x, dtype=np.float64)
        bad = np.isnan(array)
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise DyBitError(f"x holds NaN at position {where}; {self.name} has no code for it")
        index = np.searchsorted(self.midpoints, array, side="left")
        inside = np.minimum(index, len(self.midpoints) - 1)
        tie = (index < len(self.midpoints)) & (array == self.midpoints[inside])
        codes: NDArray[np.uint8] = self.level_codes[index + (tie & self.ties_up[inside])]
        return codes

    def decode(self, codes: ArrayLike) -> NDArray[np.float64]:
        """Returns the values of codes.

        Args:
            codes: Integers of any shape in 0 … 2**bits - 1.

        Returns:
            Values, float64 of the shape of ``codes``.

        Raises:
            DyBitError: ``codes`` are not integers or out of range.
        """
        array = np.asarray(codes)
        if array.dtype.kind not in "iu":
            raise DyBitError(f"codes must be integers, not {array.dtype}")
        outside = (array < 0) | (array >= 1 << self.bits)
        if outside.any():
            bad = array[outside].flat[0]
            raise DyBitError(f"codes of {self.name} are 0 to {(1 << self.bits) - 1}, not {bad}")
        values: NDArray[np.float64] = self.values[array]
        return values

    @cached_property
    def symmetric(self) -> bool:
        """Whether the levels are the same with the sign reversed; if not, the sign of the scale is a choice."""
        return np.array_equal(self.levels, -self.levels[::-1])

    def __str__(self) -> str:
        return self.name


class Table(Codebook):
    """A codebook given by its values.

    Args:
        name: Short name.
        values: Value of every code, shape (2**bits,); NaN where a code is not used. Copied and frozen.

    Raises:
        DyBitError: The number of values is not a power of two from 2 to 256, or fewer than two are finite.
    """

    def __init__(self, name: str, values: ArrayLike) -> None:
        table = np.array(values, dtype=np.float64)
        if table.ndim != 1 or table.size not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise DyBitError(f"values of {name} must be 2 to 256 numbers, a power of two, not shape {table.shape}")
        if np.isinf(table).any() or np.unique(table[~np.isnan(table)]).size < 2:
            raise DyBitError(f"values of {name} must be finite or NaN, and at least two of them different")
        table.flags.writeable = False
        self._name = name
        self.bits = table.size.bit_length() - 1
        self._values = table

    @property
    def name(self) -> str:
        """Short name."""
        return self._name

    @property
    def values(self) -> NDArray[np.float64]:
        """Value of every code, float64 of shape (2**bits,)."""
        return self._values

    def __repr__(self) -> str:
        return f"Table({self.name!r}, {self.bits} bits)"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Table)
            and self.name == other.name
            and np.array_equal(self._values, other._values, equal_nan=True)
        )

    def __hash__(self) -> int:
        return hash((self.name, self.bits))


@dataclass(frozen=True)
class Family:
    """Codebooks of one width from which every tensor, channel or group takes the best: what a recipe calls a format.

    A single format is a family of one. DyBit's variants, ANT's types and the zero points of asymmetric integers are
    all choices of this kind, and are searched by the same code.

    Args:
        name: Short name, such as ``dybit4``, ``nf4`` or ``int4asym``.
        books: The codebooks, all of one width; their order is the order of the stored choice.
        scale: The type of scale that the format prescribes (AdaptivFloat, MXFP4, NVFP4), or None for any.
        group_size: The group size that the format prescribes (MXFP4, NVFP4), or None for any.

    Raises:
        DyBitError: There is no codebook, more than 256, or their widths differ.
    """

    name: str
    books: tuple[Codebook, ...]
    scale: ScaleType | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        """Checks that the codebooks belong together."""
        widths = {book.bits for book in self.books}
        if len(widths) != 1 or len(self.books) > 256:
            raise DyBitError(f"a family needs 1 to 256 codebooks of one width, {self.name} has widths {sorted(widths)}")

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.books[0].bits

    @property
    def choice_bits(self) -> int:
        """Bits to store the chosen codebook; 0 for a family of one."""
        return (len(self.books) - 1).bit_length()

    def __str__(self) -> str:
        return self.name
