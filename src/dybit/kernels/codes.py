"""Encodes weights to packed codes and decodes them, by the compiled kernels or in plain torch, with the same bits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dybit.formats.codebook import Codebook
from dybit.formats.packing import packed_size
from dybit.kernels.arguments import address, choice_per_unit, compiled_codebook, kernels_for, per_unit
from dybit.kernels.lookup import lookup
from dybit.kernels.packed_codes import pack, spans, unpack

_F32, _U8 = torch.float32, torch.uint8
_AT_ONCE = 1 << 20  # elements that plain torch encodes at once


def encode(
    x: Tensor, scale: Tensor, choice: Tensor | None, books: tuple[Codebook, ...], group_size: int | None
) -> Tensor:
    """Rounds a matrix to the nearest codes and packs them.

    Args:
        x: float32 of shape (rows, columns), finite.
        scale: float32 of shape (1 or rows, 1 or groups).
        choice: The index of the codebook of every unit, uint8, likewise; or None for the first.
        books: The codebooks, of one width.
        group_size: Columns in a group, or None.

    Returns:
        uint8 of shape (rows, bytes); see :func:`dybit.formats.packing.packed_size`.

    Raises:
        DyBitError: A tensor has another type or shape, or a choice is beyond the codebooks.
    """
    compiled = kernels_for(x, scale, choice)
    rows, columns = x.shape
    bits = books[0].bits
    if compiled is None:
        step = max(1, _AT_ONCE // max(1, columns))
        parts = [x.new_empty(0, packed_size(columns, bits, group_size), dtype=_U8)]
        for start in range(0, rows, step):
            stop = start + step
            some = None if choice is None else _rows(choice, start, stop)
            codes = _encode_rows(x[start:stop], _rows(scale, start, stop), some, books, group_size)
            parts.append(pack(codes, bits, group_size))
        return torch.cat(parts)
    x, scale = x.contiguous(), scale.contiguous()
    choice = None if choice is None else choice.contiguous()
    groups = -(-columns // (group_size or columns))
    size = packed_size(columns, bits, group_size)
    packed = torch.empty(rows, size, dtype=_U8, device="cpu")
    compiled.encode(
        [compiled_codebook(book) for book in books],
        (rows, columns, min(group_size or columns, columns)),
        bits,
        address("x", x, _F32, (rows, columns)),
        per_unit("scale", scale, _F32, rows, groups),
        choice_per_unit(choice, rows, groups, len(books)),
        address("packed", packed, _U8, (rows, size)),
        torch.get_num_threads(),
    )
    return packed


def _encode_rows(
    x: Tensor, scale: Tensor, choice: Tensor | None, books: tuple[Codebook, ...], group_size: int | None
) -> Tensor:
    """Encodes rows in plain torch: uint8 of shape (rows, columns)."""
    parts = [x.new_empty(x.shape[0], 0, dtype=_U8)]
    column = 0
    for start, groups, length in spans(x.shape[1], group_size):
        block = x[:, start : start + groups * length].unflatten(1, (groups, length))
        ratio = block / _columns(scale, column, groups)[..., None]
        if choice is None:
            codes = lookup(books[0], x.device).encode(ratio)
        else:
            chosen = _columns(choice, column, groups)[..., None].expand(ratio.shape)
            codes = torch.empty_like(ratio, dtype=_U8)
            for index in torch.unique(chosen).tolist():
                mask = chosen == index
                codes[mask] = lookup(books[index], x.device).encode(ratio[mask])
        parts.append(codes.flatten(1))
        column += groups
    return torch.cat(parts, dim=1)


def _rows(units: Tensor, start: int, stop: int) -> Tensor:
    """Returns the entries of some rows of a (rows or 1, groups or 1) tensor. A single row applies to all."""
    return units if units.shape[0] == 1 else units[start:stop]


def _columns(units: Tensor, start: int, count: int) -> Tensor:
    """Returns the entries of some groups of a (rows or 1, groups or 1) tensor. A single column applies to all."""
    return units if units.shape[1] == 1 else units[:, start : start + count]


def decode(
    packed: Tensor,
    scale: Tensor,
    choice: Tensor | None,
    books: tuple[Codebook, ...],
    count: int,
    group_size: int | None,
) -> Tensor:
    """Returns the values of packed codes, times their scales.

    Args:
        packed: Codes, uint8 of shape (rows, bytes).
        scale: float32 of shape (1 or rows, 1 or groups).
        choice: The index of the codebook of every unit, uint8, likewise; or None for the first.
        books: The codebooks, of one width.
        count: Columns.
        group_size: Columns in a group, or None.

    Returns:
        float32 of shape (rows, count).

    Raises:
        DyBitError: A tensor has another type or shape, or a choice is beyond the codebooks.
    """
    compiled = kernels_for(packed, scale, choice)
    if compiled is None or count == 0 or scale.dtype != _F32:
        return _decode_by_torch(packed, scale, choice, books, count, group_size)
    packed, scale = packed.contiguous(), scale.contiguous()
    choice = None if choice is None else choice.contiguous()
    rows, bits, groups = packed.shape[0], books[0].bits, -(-count // (group_size or count))
    out = torch.empty(rows, count, dtype=_F32, device="cpu")
    compiled.decode(
        address("values", values_by_code(books), _F32, (len(books), 1 << bits)),
        (rows, count, min(group_size or count, count)),
        bits,
        address("packed", packed, _U8, (rows, packed_size(count, bits, group_size))),
        per_unit("scale", scale, _F32, rows, groups),
        choice_per_unit(choice, rows, groups, len(books)),
        address("out", out, _F32, (rows, count)),
        torch.get_num_threads(),
    )
    return out


def _decode_by_torch(
    packed: Tensor,
    scale: Tensor,
    choice: Tensor | None,
    books: tuple[Codebook, ...],
    count: int,
    group_size: int | None,
) -> Tensor:
    table, per_byte = _byte_table(books, packed.device)
    rows, bits = packed.shape[0], books[0].bits
    result = torch.empty(rows, count, dtype=_F32, device=packed.device)
    offset = column = 0
    for start, groups, length in spans(count, group_size):
        size = packed_size(length, bits)
        block = packed[:, offset : offset + groups * size]
        offset += groups * size
        if per_byte == 1 and bits < 8:  # codes of other widths span bytes
            block, size = unpack(block, groups * length, bits, length), length
        index = block.reshape(rows, groups, size).to(torch.int32)
        if choice is not None:
            index = index + _columns(choice, column, groups)[..., None].to(torch.int32) * 256
        values = table.index_select(0, index.reshape(-1)).view(rows, groups, size * per_byte)[..., :length]
        out = result[:, start : start + groups * length].unflatten(1, (groups, length))
        torch.mul(values, _columns(scale, column, groups)[..., None], out=out)
        column += groups
    return result


@lru_cache(maxsize=256)
def values_by_code(books: tuple[Codebook, ...]) -> Tensor:
    """Returns values by code: float32 of shape (books, 2**bits)."""
    return torch.from_numpy(np.stack([np.nan_to_num(book.values) for book in books]).astype(np.float32))


@lru_cache(maxsize=256)
def _byte_table(books: tuple[Codebook, ...], device: torch.device) -> tuple[Tensor, int]:
    """Returns values by byte: float32 of shape (books · 256, codes in a byte), and the number of codes in a byte.

    Codes of widths that do not divide 8 are unpacked first, one per byte.
    """
    bits = books[0].bits
    per_byte = 8 // bits if 8 % bits == 0 else 1
    shifts = np.arange(per_byte) * bits
    codes = np.arange(256)[:, None] >> shifts & ((1 << bits) - 1)
    table = np.concatenate([np.nan_to_num(book.values)[codes] for book in books])
    return torch.tensor(table, dtype=_F32, device=device), per_byte
