"""Codes ↔ bytes: dense, little-endian bits, every group starting on a byte. The portable layout of checkpoints."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dybit.errors import DyBitError


def packed_size(count: int, bits: int, group_size: int | None = None) -> int:
    """Returns the bytes that one row of ``count`` codes takes.

    Args:
        count: Codes in the row.
        bits: Width of a code, 1 to 8.
        group_size: Codes in a group; each group starts on a byte and the last one may be shorter. None packs the
            row as one group.

    Raises:
        DyBitError: ``count`` is negative, ``bits`` is not 1 to 8, or ``group_size`` is below 1.
    """
    if count < 0 or not 1 <= bits <= 8 or (group_size is not None and group_size < 1):
        raise DyBitError(f"cannot pack count={count} codes of bits={bits} in groups of group_size={group_size}")
    groups, tail = divmod(count, group_size) if group_size else (0, count)
    return groups * _bytes((group_size or 0) * bits) + _bytes(tail * bits)


def pack(codes: ArrayLike, bits: int, group_size: int | None = None) -> NDArray[np.uint8]:
    """Packs rows of codes.

    Code i of a group takes the bits ``i·bits`` … ``i·bits + bits - 1`` of the group, counted from the least
    significant bit of its first byte; the bits left over in the last byte are zero.

    Args:
        codes: Integers in 0 … 2**bits - 1, shape (..., count).
        bits: Width of a code, 1 to 8.
        group_size: Codes in a group, or None for one group a row.

    Returns:
        uint8 of shape (..., packed_size(count, bits, group_size)).

    Raises:
        DyBitError: A code does not fit, or as :func:`packed_size`.
    """
    array = np.asarray(codes)
    if array.ndim == 0 or array.dtype.kind not in "iu":
        raise DyBitError(f"codes must be an array of integers, not {array.dtype} of shape {array.shape}")
    count = array.shape[-1]
    size = packed_size(count, bits, group_size)
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < 1 << bits):
        raise DyBitError(f"codes must fit {bits} bits, found {int(array.min())} to {int(array.max())}")
    if array.size == 0:
        return np.zeros((*array.shape[:-1], size), dtype=np.uint8)
    planes = array.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    parts = [
        np.packbits(planes[..., start:stop, :].reshape(*array.shape[:-1], -1), axis=-1, bitorder="little")
        for start, stop in _spans(count, group_size)
    ]
    return np.concatenate(parts, axis=-1)


def unpack(packed: ArrayLike, count: int, bits: int, group_size: int | None = None) -> NDArray[np.uint8]:
    """Unpacks what :func:`pack` made.

    Args:
        packed: uint8 of shape (..., packed_size(count, bits, group_size)).
        count: Codes in a row.
        bits: Width of a code, 1 to 8.
        group_size: As given to :func:`pack`.

    Returns:
        uint8 codes of shape (..., count).

    Raises:
        DyBitError: ``packed`` is not uint8 or its rows have another length, or as :func:`packed_size`.
    """
    array = np.asarray(packed)
    size = packed_size(count, bits, group_size)
    if array.dtype != np.uint8 or array.ndim == 0 or array.shape[-1] != size:
        raise DyBitError(f"packed must be uint8 with rows of {size} bytes, not {array.dtype} of shape {array.shape}")
    codes = np.empty((*array.shape[:-1], count), dtype=np.uint8)
    offset = 0
    for start, stop in _spans(count, group_size):
        length = _bytes((stop - start) * bits)
        planes = np.unpackbits(
            array[..., offset : offset + length], axis=-1, count=(stop - start) * bits, bitorder="little"
        )
        planes = planes.reshape(*codes.shape[:-1], stop - start, bits)
        codes[..., start:stop] = (planes << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
        offset += length
    return codes


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _spans(count: int, group_size: int | None) -> list[tuple[int, int]]:
    """The (start, stop) of every group."""
    step = group_size or max(count, 1)
    return [(start, min(start + step, count)) for start in range(0, count, step)]
