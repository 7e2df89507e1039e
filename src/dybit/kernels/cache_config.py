"""How keys and values are held in a cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.format import MAX_BITS, MIN_BITS

NativeFormat = tuple[int, list[list[float]], list[float], bool]  # csrc/module_cache.cc, Format
_HALF, _FLOAT = 16, 32  # bits of numbers without codes
_MOST_BOOKS, _MOST_KNEES, _TABLE_BITS = 4, 4, 4  # csrc/cache_codes.h
_GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True)
class CacheConfig:
    """How keys and values are held in a cache.

    Keys have a scale and an offset for each channel and ``group_size`` tokens, values a scale for each token and
    ``value_group_size`` channels (the layout of KIVI, Liu et al., ICML 2024). The newest tokens are BF16 until their
    group is full and ``residual`` newer ones follow. What has been rounded is never rounded again.

    Args:
        keys: 2 to 8 bits, ``"bf16"``, the name of a format or family (at most four codebooks; of more than 4 bits
            integers or DyBit only), or None for FP32. Of a family every group takes the best.
        values: Likewise.
        group_size: Tokens of a group of keys: 16, 32, 64 or 128.
        value_group_size: Channels of a group of values, likewise. Groups are smaller if they would not divide a head.
        residual: Newest tokens that are never rounded to codes.
        rotate_keys: Whether keys are multiplied by a Hadamard matrix before they are rounded.
        rotate_values: Whether values are. It costs little and halves the error of values at 3 and 4 bits.

    Raises:
        DyBitError: A field is out of range or a format cannot be used.

    Example:
        >>> CacheConfig(keys=4, values=3).bits_per_number(head_size=64)
        (5.0, 3.25)
    """

    keys: int | str | None = 4
    values: int | str | None = 4
    group_size: int = 32
    value_group_size: int = 64
    residual: int = 0
    rotate_keys: bool = False
    rotate_values: bool = True

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("group_size", "value_group_size"):
            if getattr(self, name) not in _GROUPS:
                raise DyBitError(f"{name} must be one of {', '.join(map(str, _GROUPS))}, not {getattr(self, name)!r}")
        if not isinstance(self.residual, int) or isinstance(self.residual, bool) or self.residual < 0:
            raise DyBitError(f"residual must be a number of tokens, not {self.residual!r}")
        for name in ("rotate_keys", "rotate_values"):
            if not isinstance(getattr(self, name), bool):
                raise DyBitError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("keys", "values"):
            _native(name, getattr(self, name))

    def native(self) -> tuple[NativeFormat, NativeFormat, tuple[int, int, int, bool, bool]]:
        """Returns the extension's arguments: the formats of keys and values, and the other options."""
        options = (self.group_size, self.value_group_size, self.residual, self.rotate_keys, self.rotate_values)
        return _native("keys", self.keys), _native("values", self.values), options

    def bits_per_number(self, head_size: int) -> tuple[float, float]:
        """Returns the bits of a number of keys and of values, scales and offsets included, once they are rounded."""
        vectors = -(-head_size // 16)
        group = max(g for g in (1, 2, 4, 8) if g == 1 or (g * 16 <= self.value_group_size and vectors % g == 0))
        keys, values = _native("keys", self.keys)[0], _native("values", self.values)[0]
        return (
            keys + (32 / self.group_size if keys <= MAX_BITS else 0),
            (values + (16 / (16 * group) if values <= MAX_BITS else 0)) * vectors * 16 / head_size,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, as JSON can hold them."""
        return asdict(self)


def _names(side: str, bits: int) -> tuple[str, ...]:
    """The formats of a width that lose least: see benchmarks/kv_cache.py."""
    if bits == MIN_BITS:
        return ("s2mid",)
    if bits <= _TABLE_BITS:
        return f"s{bits}r1mid", f"s{bits}r2mid"
    return (f"s{bits}r1mid",) if side == "keys" else (f"s{bits}r2",)


@lru_cache(maxsize=256, typed=True)
def _native(side: str, value: int | str | None) -> NativeFormat:
    if value is None or value == "bf16":
        return _FLOAT if value is None else _HALF, [], [], False
    if isinstance(value, str):
        books = catalogue.family(value).books
    elif isinstance(value, int) and not isinstance(value, bool) and MIN_BITS <= value <= MAX_BITS:
        books = tuple(book for name in _names(side, value) for book in catalogue.family(name).books)
    else:
        raise DyBitError(f"{side} must be {MIN_BITS} to {MAX_BITS} bits, 'bf16', a format or None, not {value!r}")
    bits = books[0].bits
    levels = [[float(level) for level in book.levels] for book in books]
    if len(books) > _MOST_BOOKS or len({len(book) for book in levels}) > 1:
        raise DyBitError(f"{side} must be a family of at most {_MOST_BOOKS} codebooks of one size, not {value!r}")
    if any(book[0] >= 0 or book[-1] <= 0 for book in levels):
        raise DyBitError(f"{side} must be a signed format, not {value!r}")
    if bits > _TABLE_BITS:
        if len(books) > 1 or not _is_piecewise(levels[0]):
            raise DyBitError(
                f"{side} of more than {_TABLE_BITS} bits must be an integer or a DyBit format, not {value!r}"
            )
        step = _middle_step(levels[0])
        levels = [[level / step for level in levels[0]]]
    searched = side == "values" and bits <= _TABLE_BITS
    return bits, levels, [1.0, 0.9, 0.8] if searched else [1.0], side == "keys"


def _middle_step(levels: list[float]) -> float:
    middle = len(levels) // 2
    return levels[middle] - levels[middle - 1]


def _is_piecewise(levels: list[float]) -> bool:
    """Whether levels are symmetric and equally spaced but for a few changes of the step."""
    steps = np.diff(levels)
    symmetric = np.array_equal(levels, -np.flip(levels))
    return bool(symmetric and np.count_nonzero(np.diff(steps[len(steps) // 2 :])) <= _MOST_KNEES)


FLOAT_CACHE = CacheConfig(keys=None, values=None, rotate_values=False)
