"""Torch operators on codes: pack, unpack, dequantize and fake-quantize, as exact as the NumPy oracle in ``codec``.

The operators are registered as ``torch.ops.dybit.*``, so
that ``torch.compile`` and ``torch.export`` see them whole. The compiled kernels compute them where they can
(:mod:`dybit.kernels.codes`), and what is here in plain torch where they cannot, with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dybit.formats import catalogue
from dybit.formats.codebook import Codebook
from dybit.formats.packing import packed_size
from dybit.kernels import codes

_TABLE_LIMIT = 1 << 17
_TINIEST = 2.0**-126  # smallest normal float
_LIBRARY = torch.library.Library("dybit", "DEF")


class Lookup:
    """A codebook as torch tensors, with exact rounding to the nearest level for FP32 inputs.

    Where all midpoints are multiples of one power of two (every DyBit, integer and minifloat format), a level is
    found by one table look-up instead of a binary search: several times faster, with the same result.

    Args:
        book: The codebook.
        device: Where the tensors live.

    Attributes:
        levels: The values in increasing order, float32 of shape (levels,).
        codes: The code of every level, uint8 of shape (levels,).
    """

    def __init__(self, book: Codebook, device: torch.device) -> None:
        self.levels = torch.tensor(book.levels, dtype=torch.float32, device=device)
        self.codes = torch.tensor(book.level_codes, dtype=torch.uint8, device=device)
        self._boundaries = torch.tensor(book.boundaries(np.float32), dtype=torch.float32, device=device)
        self._unit, self._limit = grid(book.midpoints)
        if self._unit:
            # Entry 2k is the point k·unit, entry 2k+1 the open interval above it.
            points = np.arange(-2 * self._limit, 2 * self._limit + 1) * (self._unit / 2)
            table = np.searchsorted(book.midpoints, points, side="left")
            on = np.minimum(table, len(book.midpoints) - 1)
            table += (book.midpoints[on] == points) & book.ties_up[on] & (table == on)
            self._table = torch.tensor(table, dtype=torch.int32, device=device)

    def nearest(self, x: Tensor) -> Tensor:
        """Returns the index of the level nearest to each element.

        Args:
            x: float32 of any shape, without NaN; infinities saturate.

        Returns:
            int32 of the shape of ``x``.
        """
        if not self._unit:
            return torch.bucketize(x.contiguous(), self._boundaries, out_int32=True)
        position = (x * (1.0 / self._unit)).clamp_(-self._limit, self._limit)
        index = position.floor().add_(position.ceil_()).add_(2 * self._limit).to(torch.int32)
        return self._table.index_select(0, index.reshape(-1)).view(x.shape)

    def round(self, x: Tensor) -> Tensor:
        """Returns the nearest value of each element: float32 of the shape of ``x`` (float32, without NaN)."""
        return self.levels.index_select(0, self.nearest(x).view(-1)).view(x.shape)

    def encode(self, x: Tensor) -> Tensor:
        """Returns the nearest code of each element: uint8 of the shape of ``x`` (float32, without NaN)."""
        return self.codes.index_select(0, self.nearest(x).view(-1)).view(x.shape)


def grid(midpoints: NDArray[np.float64]) -> tuple[float, int]:
    """The power of two that divides every midpoint and how many of it reach beyond all of them; (0, 0) if none."""
    for exponent in range(4, -17, -1):
        unit = 2.0**exponent
        steps = midpoints / unit
        if np.array_equal(steps, np.round(steps)):
            limit = int(np.abs(steps).max()) + 1
            return (unit, limit) if 4 * limit <= _TABLE_LIMIT else (0.0, 0)
    return 0.0, 0


@lru_cache(maxsize=1024)
def lookup(book: Codebook, device: torch.device) -> Lookup:
    """Returns the cached :class:`Lookup` of a codebook on a device."""
    return Lookup(book, device)


def pack(codes: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """Packs rows of codes as :func:`dybit.formats.packing.pack` does.

    Args:
        codes: uint8 of shape (rows, count), every code below 2**bits.
        bits: Width of a code, 1 to 8.
        group_size: Codes in a group, or None for one group a row.

    Returns:
        uint8 of shape (rows, packed_size(count, bits, group_size)).
    """
    rows, count = codes.shape
    parts = []
    for start, groups, length in spans(count, group_size):
        block = codes[:, start : start + groups * length].reshape(rows * groups, length)
        parts.append(_pack_groups(block, bits).reshape(rows, groups * packed_size(length, bits)))
    return torch.cat(parts, dim=1) if parts else codes.new_zeros(rows, 0)


def unpack(packed: Tensor, count: int, bits: int, group_size: int | None = None) -> Tensor:
    """Unpacks what :func:`pack` made: uint8 (rows, bytes) to uint8 (rows, count)."""
    rows = packed.shape[0]
    parts, offset = [], 0
    for _, groups, length in spans(count, group_size):
        size = packed_size(length, bits)
        block = packed[:, offset : offset + groups * size].reshape(rows * groups, size)
        parts.append(_unpack_groups(block, length, bits).reshape(rows, groups * length))
        offset += groups * size
    return torch.cat(parts, dim=1) if parts else packed.new_zeros(rows, 0)


def spans(count: int, group_size: int | None) -> list[tuple[int, int, int]]:
    """(start, groups, length) of the full groups and of the tail."""
    size = group_size or max(count, 1)
    full, tail = divmod(count, size)
    spans = [(0, full, size)] if full else []
    return [*spans, (full * size, 1, tail)] if tail else spans


def _pack_groups(codes: Tensor, bits: int) -> Tensor:
    """Eight codes fill exactly ``bits`` bytes: (n, length) uint8 to (n, bytes) uint8."""
    if bits == 8:
        return codes
    length = codes.shape[1]
    eights = torch.nn.functional.pad(codes, (0, -length % 8)).unflatten(1, (-1, 8))
    word = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= eights[..., i].to(torch.int64) << (i * bits)
    shifts = torch.arange(bits, dtype=torch.int64, device=codes.device) * 8
    size = packed_size(length, bits)
    return ((word[..., None] >> shifts) & 255).to(torch.uint8).flatten(1)[:, :size]


def _unpack_groups(packed: Tensor, length: int, bits: int) -> Tensor:
    """The inverse of :func:`_pack_groups`."""
    if bits == 8:
        return packed
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    word = torch.zeros(padded.shape[:2], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        word |= padded[..., i].to(torch.int64) << (8 * i)
    shifts = torch.arange(8, dtype=torch.int64, device=packed.device) * bits
    return ((word[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)[:, :length]


@lru_cache(maxsize=256)
def _byte_table(name: str, device: torch.device) -> tuple[Tensor, int]:
    """Values by byte: float32 of shape (books · 256, codes in a byte), and the number of codes in a byte.

    For widths that do not divide 8, the codes come unpacked, one a byte.
    """
    books = catalogue.family(name).books
    bits = books[0].bits
    per_byte = 8 // bits if 8 % bits == 0 else 1
    shifts = np.arange(per_byte) * bits
    codes = np.arange(256)[:, None] >> shifts & ((1 << bits) - 1)
    table = np.concatenate([np.nan_to_num(book.values)[codes] for book in books])
    return torch.tensor(table, dtype=torch.float32, device=device), per_byte


def _dequantize(
    packed: Tensor, scale: Tensor, choice: Tensor | None, family: str, count: int, bits: int, group_size: int
) -> Tensor:
    """Implementation of ``torch.ops.dybit.dequantize``; see :data:`SCHEMAS`."""
    done = codes.decode(packed, scale, choice, catalogue.family(family).books, count, group_size or None)
    if done is not None:
        return done
    table, per_byte = _byte_table(family, packed.device)
    rows = packed.shape[0]
    result = torch.empty(rows, count, dtype=torch.float32, device=packed.device)
    offset = column = 0
    for start, groups, length in spans(count, group_size or None):
        size = packed_size(length, bits)
        block = packed[:, offset : offset + groups * size].reshape(rows, groups, size)
        offset += groups * size
        if per_byte == 1:  # the codes of other widths straddle bytes
            block = _unpack_groups(block.reshape(rows * groups, size), length, bits).reshape(rows, groups, length)
        index = block.to(torch.int32)
        if choice is not None:
            index = index + _columns(choice, column, groups)[..., None].to(torch.int32) * 256
        values = table.index_select(0, index.reshape(-1)).view(rows, groups, block.shape[2] * per_byte)[..., :length]
        out = result[:, start : start + groups * length].unflatten(1, (groups, length))
        torch.mul(values, _columns(scale, column, groups)[..., None], out=out)
        column += groups
    return result


def _columns(units: Tensor, start: int, count: int) -> Tensor:
    """The columns of a (rows or 1, groups or 1) tensor that belong to some groups; a single column serves all."""
    return units if units.shape[1] == 1 else units[:, start : start + count]


def _scaled_round(x: Tensor, scale: Tensor, offset: Tensor | None, format: str) -> Tensor:
    table = lookup(catalogue.family(format).books[0], x.device)
    shifted = x.float() if offset is None else x.float() - offset
    ratio = shifted / scale
    unknown = torch.isnan(ratio)
    value = table.round(ratio.masked_fill(unknown, 0.0)) * scale
    value = value if offset is None else value + offset
    # NaN has no code: it must come out as NaN and never as a number.
    return value.masked_fill(unknown, math.nan).to(x.dtype)


def _fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, format: str) -> Tensor:
    """Implementation of ``torch.ops.dybit.fake_quantize``; see :data:`SCHEMAS`."""
    done = codes.fake_quantize(x, scale, offset, catalogue.family(format).books[0])
    return done if done is not None else _scaled_round(x, scale, offset, format).contiguous()


def _fake_quantize_dynamic(x: Tensor, format: str, reach: float, group_size: int) -> Tensor:
    """Implementation of ``torch.ops.dybit.fake_quantize_dynamic``; see :data:`SCHEMAS`."""
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    done = codes.fake_quantize_dynamic(x, catalogue.family(format).books[0], reach, group_size)
    if done is not None:
        return done
    parts = []
    for start, groups, length in spans(x.shape[-1], group_size or None):
        block = x[..., start : start + groups * length].unflatten(-1, (groups, length))
        scale = block.detach().float().abs().amax(-1, keepdim=True) / reach
        # Where a group is not finite, infinities saturate at scale 1 and NaN stays; where it is zero, or so small that
        # its scale is, the smallest scale takes a level that should be zero closest to it in a format without a zero.
        scale = torch.where(torch.isfinite(scale), scale.clamp(min=_TINIEST), 1.0)
        parts.append(_scaled_round(block, scale, None, format).flatten(-2))
    return torch.cat(parts, dim=-1)


SCHEMAS = {
    # packed (rows, bytes) uint8; scale (rows|1, groups|1) float32; choice as scale, uint8, the codebook of each unit;
    # group_size 0: one group a row. Returns (rows, count) float32.
    "dequantize": (
        "(Tensor packed, Tensor scale, Tensor? choice, str family, int count, int bits, int group_size) -> Tensor"
    ),
    # x of any shape and floating dtype; scale and offset broadcast against it. Returns the values that its codes
    # stand for, of x's shape and dtype; NaN stays NaN.
    "fake_quantize": "(Tensor x, Tensor scale, Tensor? offset, str format) -> Tensor",
    # The same with a scale for each last-dimension row, or group of group_size (0: the row): that which maps its
    # largest magnitude to reach.
    "fake_quantize_dynamic": "(Tensor x, str format, float reach, int group_size) -> Tensor",
}


def _dequantize_shape(
    packed: Tensor, scale: Tensor, choice: Tensor | None, family: str, count: int, bits: int, group_size: int
) -> Tensor:
    return packed.new_empty(packed.shape[0], count, dtype=torch.float32)


def _same_shape(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _straight_through(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of rounding, taken as one; scales learn in quantization-aware training, not here."""
    return (grad, *(None,) * (ctx.inputs - 1))  # type: ignore[attr-defined]


def _count_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.inputs = len(inputs)  # type: ignore[attr-defined]


def _register() -> None:
    implementations: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "dequantize": (_dequantize, _dequantize_shape),
        "fake_quantize": (_fake_quantize, _same_shape),
        "fake_quantize_dynamic": (_fake_quantize_dynamic, _same_shape),
    }
    for name, (implementation, shape) in implementations.items():
        _LIBRARY.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dybit::{name}", shape, lib=_LIBRARY)
        if name != "dequantize":
            torch.library.register_autograd(
                f"dybit::{name}", _straight_through, setup_context=_count_inputs, lib=_LIBRARY
            )


_register()
dequantize = torch.ops.dybit.dequantize
fake_quantize = torch.ops.dybit.fake_quantize
fake_quantize_dynamic = torch.ops.dybit.fake_quantize_dynamic
