"""Rounding to the nearest level, and its gradient: by the compiled kernels or in plain torch.

Each function decides which of the two computes. Both give the same bits, except for sums over many elements, whose
order differs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dybit.formats.codebook import Codebook
from dybit.kernels.arguments import NO_UNITS, address, choice_per_unit, compiled_codebook, kernels_for, per_unit
from dybit.kernels.lookup import chosen_lookup, level_ends, lookup
from dybit.kernels.packed_codes import spans

_LEAST_RUN = 8  # elements per scale: with fewer, torch is as fast
_TINIEST = 2.0**-126  # smallest normal float
_MOST = 3.4e38  # below the largest float, so that a quotient times its divisor does not overflow
_F32 = torch.float32


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, book: Codebook) -> Tensor:
    """Rounds to the values of codes.

    Args:
        x: Floating point of any shape. Infinities saturate; NaN stays NaN.
        scale: float32, broadcasts against ``x``.
        offset: float32, broadcasts against ``x``, or None.
        book: The codebook.

    Returns:
        Of the shape and type of ``x``, contiguous.
    """
    compiled = kernels_for(x, scale, offset)
    typed = scale.dtype == _F32 and (offset is None or (offset.dtype == _F32 and offset.numel() == 1))
    runs = _runs(x.shape, scale) if compiled is not None and typed and x.numel() else None
    if runs is None:
        return _round_by_torch(x, scale, offset, book).contiguous()
    shape, scales = runs
    return _round_by_kernel(
        x,
        book,
        shape,
        (address("scale", scales.view(-1), _F32, (shape[0],)), shape[0] > 1, False),
        0 if offset is None else address("offset", offset.reshape(-1), _F32, (1,)),
        1.0,
    )


def fake_quantize_dynamic(x: Tensor, book: Codebook, reach: float, group_size: int) -> Tensor:
    """Rounds to the values of codes, at scales that map the largest magnitude of every row or group to ``reach``.

    Args:
        x: Floating point of shape (..., columns). A group with NaN or infinity has no scale and becomes NaN. If the
            largest value of the codebook would overflow, the scale is smaller.
        book: The codebook.
        reach: The value that the largest magnitude is mapped to.
        group_size: Columns that share a scale; 0 for all.

    Returns:
        Of the shape and type of ``x``, contiguous. Values beyond a narrower type are its largest number.
    """
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = x.shape[-1]
    if kernels_for(x) is not None:
        shape = (x.numel() // columns, columns, min(group_size or columns, columns))
        return _round_by_kernel(x, book, shape, NO_UNITS, 0, reach)
    parts, most = [], largest_scale(book)
    for start, groups, length in spans(columns, group_size or None):
        block = x[..., start : start + groups * length].unflatten(-1, (groups, length))
        peak = block.detach().float().abs().amax(-1, keepdim=True)
        # In a group of zeros, or with a scale of zero, the smallest scale keeps values near zero even in a format
        # without a zero.
        scale = (peak / reach).clamp(_TINIEST, most)
        scale = scale.masked_fill_(~torch.isfinite(peak), math.nan)
        parts.append(_round_by_torch(block, scale, None, book).flatten(-2))
    return torch.cat(parts, dim=-1)


def largest_scale(book: Codebook) -> float:
    """The largest dynamic scale: that at which the largest value of a codebook is still a float32 number."""
    return float(np.float32(_MOST) / np.maximum(np.float32(np.abs(book.levels).max()), np.float32(1.0)))


def round_chosen(x: Tensor, scale: Tensor, choice: Tensor, books: tuple[Codebook, ...]) -> Tensor:
    """Rounds units that use several codebooks; NaN stays NaN.

    Args:
        x: float32 of shape (units, length).
        scale: float32 of shape (units or 1, 1).
        choice: The index of the codebook of every unit, uint8 of shape (units, 1).
        books: The codebooks.

    Returns:
        float32 of shape (units, length).

    Raises:
        DyBitError: A tensor has another type or shape, or a choice is beyond the codebooks.
    """
    compiled = kernels_for(x, scale, choice)
    if compiled is None or x.numel() == 0:
        ratio = x / scale
        unknown = torch.isnan(ratio)
        value = chosen_lookup(books, x.device).round(ratio.masked_fill_(unknown, 0.0), choice)
        return value.mul_(scale).masked_fill_(unknown, math.nan)
    x, scale, choice = x.contiguous(), scale.contiguous(), choice.contiguous()
    out, (units, length) = torch.empty_like(x), x.shape
    compiled.round_chosen(
        [compiled_codebook(book) for book in books],
        (units, length, length),
        address("x", x, _F32, (units, length)),
        per_unit("scale", scale, _F32, units, 1),
        choice_per_unit(choice, units, 1, len(books)),
        address("out", out, _F32, (units, length)),
        torch.get_num_threads(),
    )
    return out


def pass_through(
    x: Tensor, grad: Tensor, rounded: Tensor, scale: Tensor, books: tuple[Codebook, ...], choice: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the straight-through gradient of rounded units, and the sums for the gradients of their scales.

    Args:
        x: The input of rounding, float32 of shape (units, length).
        grad: The gradient of ``rounded``, float32 of the same shape.
        rounded: The result of rounding, float32 of the same shape.
        scale: float32 of shape (units or 1, 1).
        books: The codebooks.
        choice: The index of the codebook of every unit, uint8 of shape (units, 1); None for the first.

    Returns:
        First ``grad`` where x / scale is between the codebook's lowest and highest level, and 0 elsewhere. Second, for
        every unit, the sum of grad · rounded minus the sum of the first result · x, float32 of shape (units, 1).

    Raises:
        DyBitError: A tensor has another type or shape, or a choice is beyond the codebooks.
    """
    ends = level_ends(books, x.device)
    compiled = kernels_for(x, grad, rounded, scale, choice)
    if compiled is None or x.numel() == 0:
        chosen = ends[:1] if choice is None else ends.index_select(0, choice.view(-1).to(torch.int32))
        low, high = chosen.split(1, dim=1)
        ratio = x / scale
        x_grad = torch.where((ratio >= low).logical_and_(ratio <= high), grad, 0.0)
        return x_grad, (grad * rounded).addcmul_(x_grad, x, value=-1).sum(1, keepdim=True)
    x, grad, rounded, scale = x.contiguous(), grad.contiguous(), rounded.contiguous(), scale.contiguous()
    choice = None if choice is None else choice.contiguous()
    units, length = x.shape
    shape = (units, length)
    x_grad, slopes = torch.empty_like(x), torch.empty(units, 1, dtype=_F32, device="cpu")
    compiled.pass_through(
        address("ends", ends, _F32, (len(books), 2)),
        (units, length, length),
        address("x", x, _F32, shape),
        address("grad", grad, _F32, shape),
        address("rounded", rounded, _F32, shape),
        per_unit("scale", scale, _F32, units, 1),
        choice_per_unit(choice, units, 1, len(books)),
        address("x_grad", x_grad, _F32, shape),
        address("slopes", slopes, _F32, (units, 1)),
        torch.get_num_threads(),
    )
    return x_grad, slopes


def pass_through_whole(
    x: Tensor, grad: Tensor, rounded: Tensor, scale: Tensor, offset: Tensor | None, book: Codebook
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same for a tensor with one scale and an optional offset.

    Args:
        x: The input of rounding, floating point of any shape.
        grad: The gradient of ``rounded``, of the same shape.
        rounded: The result of rounding, of the same shape.
        scale: float32 of shape (1,).
        offset: float32 of shape (1,), or None.
        book: The codebook.

    Returns:
        ``grad`` where (x - offset) / scale is between the lowest and highest level, and 0 elsewhere; the gradient of
        the scale times the scale, float32 of shape (1,); and the gradient of the offset, float32 of shape (1,), or
        None.
    """
    laid = x.dtype == _F32 and x.ndim > 1 and x.is_contiguous() and grad.is_contiguous()
    if offset is None and laid and x.numel() and kernels_for(x, grad, rounded, scale) is not None:
        x2, grad2, rounded2 = (tensor.view(len(x), -1) for tensor in (x, grad, rounded))
        x_grad, slopes = pass_through(x2, grad2, rounded2, scale.view(1, 1), (book,), None)
        return x_grad.view(x.shape), slopes.sum(0), None
    s, o = float(scale), 0.0 if offset is None else float(offset)
    low, high = sorted(np.float32(level * s + o) for level in (book.levels[0], book.levels[-1]))
    # The operator keeps gradients strictly between its bounds.
    below, above = float(np.nextafter(low, -np.inf)), float(np.nextafter(high, np.inf))
    x_grad = torch.ops.aten.hardtanh_backward(grad, x, below, above)
    slope = _dot(grad, rounded) - _dot(x_grad, x)
    if offset is None:
        return x_grad, slope.view(1), None
    clipped = grad.sum(dtype=_F32) - x_grad.sum(dtype=_F32)
    return x_grad, (slope - o * clipped).view(1), clipped.view(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())


def _round_by_kernel(
    x: Tensor, book: Codebook, shape: tuple[int, int, int], scale: tuple[int, bool, bool], offset: int, reach: float
) -> Tensor:
    """Rounds (rows, columns, columns of a group) at the given scale, or at dynamic scales of ``reach``."""
    given = (x if x.dtype in (_F32, torch.bfloat16) else x.float()).contiguous()
    out = torch.empty_like(given)
    compiled_codebook(book).round(
        shape,
        address("x", given, given.dtype, x.shape),
        address("out", out, given.dtype, x.shape),
        given.dtype == torch.bfloat16,
        scale,
        offset,
        reach,
        torch.get_num_threads(),
    )
    return out if out.dtype == x.dtype else _narrow(out, x.dtype)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts float32; what would overflow becomes the largest number of the type."""
    if dtype in (torch.float16, torch.bfloat16):
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


def _runs(shape: torch.Size, scale: Tensor) -> tuple[tuple[int, int, int], Tensor] | None:
    """Returns (rows, columns, columns) and a contiguous scale for every row; None if too few elements share a scale."""
    if scale.numel() == 1 and scale.ndim <= len(shape):
        count = shape.numel()
        return (1, count, count), scale
    sizes = (1,) * (len(shape) - scale.ndim) + tuple(scale.shape)
    if len(sizes) != len(shape) or any(a not in (1, b) for a, b in zip(sizes, shape, strict=True)):
        return None
    last = max(i for i, size in enumerate(sizes) if size > 1)
    columns = math.prod(shape[last + 1 :])
    if columns < _LEAST_RUN:
        return None
    rows = scale.reshape(sizes[: last + 1]).expand(shape[: last + 1]).reshape(-1).contiguous()
    return (rows.numel(), columns, columns), rows


def _round_by_torch(x: Tensor, scale: Tensor, offset: Tensor | None, book: Codebook) -> Tensor:
    table = lookup(book, x.device)
    shifted = x.float() if offset is None else x.float() - offset
    ratio = shifted / scale
    unknown = torch.isnan(ratio)
    value = table.round(ratio.masked_fill(unknown, 0.0)) * scale
    value = value if offset is None else value + offset
    # NaN has no code: it must stay NaN and never become a number.
    return _narrow(value.masked_fill(unknown, math.nan), x.dtype)
