"""Packs codes of 1 to 8 bits into bytes and unpacks them, in plain torch (docs/format.md, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from dybit.formats.packing import packed_size


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
    """Inverts :func:`pack`: uint8 (rows, bytes) to uint8 (rows, count)."""
    rows = packed.shape[0]
    parts, offset = [], 0
    for _, groups, length in spans(count, group_size):
        size = packed_size(length, bits)
        block = packed[:, offset : offset + groups * size].reshape(rows * groups, size)
        parts.append(_unpack_groups(block, length, bits).reshape(rows, groups * length))
        offset += groups * size
    return torch.cat(parts, dim=1) if parts else packed.new_zeros(rows, 0)


def spans(count: int, group_size: int | None) -> list[tuple[int, int, int]]:
    """Yields (start, groups, length) of the full groups and of the tail."""
    size = group_size or max(count, 1)
    full, tail = divmod(count, size)
    spans = [(0, full, size)] if full else []
    return [*spans, (full * size, 1, tail)] if tail else spans


def _pack_groups(codes: Tensor, bits: int) -> Tensor:
    """Packs groups, (n, length) uint8 to (n, bytes) uint8. Eight codes fill exactly ``bits`` bytes."""
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
    """Inverts :func:`_pack_groups`."""
    if bits == 8:
        return packed
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    word = torch.zeros(padded.shape[:2], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        word |= padded[..., i].to(torch.int64) << (8 * i)
    shifts = torch.arange(8, dtype=torch.int64, device=packed.device) * bits
    return ((word[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)[:, :length]
