"""The compiled kernels on codes, for torch tensors: rounding, packing, values, and the sums of the search for scales.

Where there is no extension, or a tensor is none
that the kernels take, functions return None, and the caller computes the same in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dybit.formats.codebook import Codebook
from dybit.formats.packing import packed_size
from dybit.kernels import extension

_LEAST_RUN = 8  # elements that share a scale: with fewer, torch is as fast
_NONE = (0, False, False)


def _ready(*tensors: Tensor | None) -> Any:  # noqa: ANN401  # the extension's module
    """The extension, if all tensors are on the CPU."""
    if any(tensor is not None and tensor.device.type != "cpu" for tensor in tensors):
        return None
    return extension.load()


@lru_cache(maxsize=1024)
def _book(book: Codebook) -> Any:  # noqa: ANN401
    """A codebook as the kernels keep it."""
    compiled = extension.load()
    assert compiled is not None
    boundaries = np.ascontiguousarray(book.boundaries(np.float32), dtype=np.float32)
    levels = np.ascontiguousarray(book.levels, dtype=np.float32)
    codes = np.ascontiguousarray(book.level_codes)
    return compiled.Codebook(boundaries.ctypes.data, levels.ctypes.data, codes.ctypes.data, len(levels))


def _spread(units: Tensor) -> tuple[int, bool, bool]:
    """A contiguous (rows or 1, groups or 1) tensor as the kernels are told of it."""
    return units.data_ptr(), units.shape[0] > 1, units.shape[1] > 1


def _as_given(x: Tensor) -> Tensor:
    """Contiguous, of a type that the kernels read."""
    return (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, book: Codebook) -> Tensor | None:
    """``torch.ops.dybit.fake_quantize``: for scales that runs of elements share, and one offset."""
    compiled = _ready(x, scale, offset)
    typed = scale.dtype == torch.float32 and (offset is None or offset.dtype == torch.float32)
    if compiled is None or not typed or x.numel() == 0 or (offset is not None and offset.numel() != 1):
        return None
    runs = _runs(x.shape, scale)
    if runs is None:
        return None
    shape, scales = runs
    given = _as_given(x)
    out = torch.empty_like(given)
    _book(book).round(
        shape,
        given.data_ptr(),
        out.data_ptr(),
        given.dtype == torch.bfloat16,
        (scales.data_ptr(), shape[0] > 1, False),
        0 if offset is None else offset.data_ptr(),
        1.0,
        torch.get_num_threads(),
    )
    return out.to(x.dtype)


def _runs(shape: torch.Size, scale: Tensor) -> tuple[tuple[int, int, int], Tensor] | None:
    """(rows, columns, columns) and a contiguous scale for every row; None where a scale serves too few."""
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


def fake_quantize_dynamic(x: Tensor, book: Codebook, reach: float, group_size: int) -> Tensor | None:
    """``torch.ops.dybit.fake_quantize_dynamic``."""
    compiled = _ready(x)
    if compiled is None or x.numel() == 0 or x.ndim == 0:
        return None
    given = _as_given(x)
    out = torch.empty_like(given)
    columns = x.shape[-1]
    _book(book).round(
        (x.numel() // columns, columns, min(group_size or columns, columns)),
        given.data_ptr(),
        out.data_ptr(),
        given.dtype == torch.bfloat16,
        _NONE,
        0,
        reach,
        torch.get_num_threads(),
    )
    return out.to(x.dtype)


def round_chosen(x: Tensor, scale: Tensor, choice: Tensor, books: Sequence[Codebook]) -> Tensor | None:
    """The values nearest to units of several codebooks; NaN stays NaN.

    Args:
        x: float32 of shape (units, length).
        scale: float32 of shape (units, 1).
        choice: The index of the codebook of every unit, uint8, likewise.
        books: The codebooks.
    """
    compiled = _ready(x, scale, choice)
    if compiled is None or x.numel() == 0 or choice.dtype != torch.uint8:
        return None
    x, scale, choice = x.contiguous(), scale.contiguous(), choice.contiguous()
    out, (units, length) = torch.empty_like(x), x.shape
    compiled.round_chosen(
        [_book(book) for book in books],
        (units, length, length),
        x.data_ptr(),
        _spread(scale),
        _spread(choice),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def pass_through(
    x: Tensor, grad: Tensor, rounded: Tensor, scale: Tensor, ends: Tensor, choice: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The straight-through gradient of rounded units and what their scales' gradients need.

    Args:
        x: What was rounded, float32 of shape (units, length).
        grad: The gradient of ``rounded``, likewise.
        rounded: Likewise.
        scale: float32 of shape (units or 1, 1).
        ends: The lowest and the highest level of every codebook, float32 of shape (books, 2).
        choice: The index of the codebook of every unit, uint8 of shape (units, 1); None for the first.

    Returns:
        ``grad`` where x / scale is between the ends and 0 elsewhere, and the sum of grad · rounded minus that · x over
        every unit, float32 of shape (units, 1). None without the kernels.
    """
    compiled = _ready(x, grad, rounded, scale, ends, choice)
    if compiled is None or x.numel() == 0 or (choice is not None and choice.dtype != torch.uint8):
        return None
    x, grad, rounded, scale = x.contiguous(), grad.contiguous(), rounded.contiguous(), scale.contiguous()
    choice = None if choice is None else choice.contiguous()
    units, length = x.shape
    x_grad, slopes = torch.empty_like(x), torch.empty(units, 1)
    compiled.pass_through(
        ends.data_ptr(),
        (units, length, length),
        x.data_ptr(),
        grad.data_ptr(),
        rounded.data_ptr(),
        _spread(scale),
        _NONE if choice is None else _spread(choice),
        x_grad.data_ptr(),
        slopes.data_ptr(),
        torch.get_num_threads(),
    )
    return x_grad, slopes


def encode(
    x: Tensor, scale: Tensor, choice: Tensor | None, books: Sequence[Codebook], group_size: int | None
) -> Tensor | None:
    """The packed codes of a matrix: uint8 of shape (rows, bytes).

    Args:
        x: float32 of shape (rows, columns), finite.
        scale: float32 of shape (1 or rows, 1 or groups).
        choice: The index of the codebook of every unit, uint8, likewise; or None for the first.
        books: The codebooks.
        group_size: Columns in a group, or None.
    """
    compiled = _ready(x, scale, choice)
    if compiled is None:
        return None
    rows, columns = x.shape
    bits = books[0].bits
    x, scale = x.contiguous(), scale.contiguous()
    choice = None if choice is None else choice.contiguous()
    packed = torch.empty(rows, packed_size(columns, bits, group_size), dtype=torch.uint8)
    compiled.encode(
        [_book(book) for book in books],
        (rows, columns, min(group_size or columns, columns)),
        bits,
        x.data_ptr(),
        _spread(scale),
        _NONE if choice is None else _spread(choice),
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    return packed


@lru_cache(maxsize=256)
def _values(books: tuple[Codebook, ...]) -> Tensor:
    """Values by code: float32 of shape (books, 2**bits)."""
    return torch.from_numpy(np.stack([np.nan_to_num(book.values) for book in books]).astype(np.float32))


def decode(
    packed: Tensor,
    scale: Tensor,
    choice: Tensor | None,
    books: tuple[Codebook, ...],
    count: int,
    group_size: int | None,
    index: Tensor | None = None,
) -> Tensor | None:
    """``torch.ops.dybit.dequantize``, of the rows in ``index`` (int64, contiguous) where it is given."""
    compiled = _ready(packed, scale, choice, index)
    if compiled is None or count == 0 or scale.dtype != torch.float32:
        return None
    packed, scale = packed.contiguous(), scale.contiguous()
    choice = None if choice is None else choice.contiguous()
    if choice is not None and choice.numel() and int(choice.max()) >= len(books):  # a file can hold anything
        return None
    rows = packed.shape[0] if index is None else index.numel()
    out = torch.empty(rows, count)
    compiled.decode(
        _values(books).data_ptr(),
        (rows, count, min(group_size or count, count)),
        books[0].bits,
        packed.data_ptr(),
        0 if index is None else index.data_ptr(),
        _spread(scale),
        _NONE if choice is None else _spread(choice),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def fit(book: Codebook, x: Tensor, weights: Tensor | None, scale: Tensor) -> Tensor | None:
    """Sums over every row at its scale: of the squared error, of value · x and of value², each weighted.

    Args:
        book: The codebook.
        x: float32 of shape (units, length), contiguous.
        weights: As ``x``, or None for ones.
        scale: float32 of shape (units or 1, 1).

    Returns:
        float64 of shape (3, units).
    """
    compiled = _ready(x, weights, scale)
    if compiled is None:
        return None
    units, length = x.shape
    x, scale = x.contiguous(), scale.contiguous()
    weights = None if weights is None else weights.contiguous()
    out = torch.empty(units, 3, dtype=torch.float64)
    pointer = 0 if weights is None else weights.data_ptr()
    _book(book).fit(
        (units, length, length), x.data_ptr(), pointer, _spread(scale), out.data_ptr(), torch.get_num_threads()
    )
    return out.T


class Coarse:
    """The table of a coarse search (see :mod:`dybit.tensors.scale_search`) as the kernels keep it.

    Args:
        table: Error by cell and pair, float32 of shape (cells, pairs).
        owners: The range of pairs of every codebook.
    """

    def __init__(self, table: Tensor, owners: Sequence[tuple[int, int]]) -> None:
        compiled = extension.load()
        assert compiled is not None
        table = table.contiguous()
        first = np.array([start for start, _ in owners] + [owners[-1][1]], dtype=np.int32)
        self._books = len(owners)
        self._half = table.shape[0] // 2
        self._table = compiled.CoarseTable(table.data_ptr(), self._half, table.shape[1], first.ctypes.data, self._books)

    def search(self, x: Tensor, weights: Tensor | None, best: int) -> Tensor:
        """The pairs of the least error of every row and codebook: int32 of shape (units, books, best)."""
        units, length = x.shape
        x = x.contiguous()
        weights = None if weights is None else weights.contiguous()
        out = torch.empty(units, self._books, best, dtype=torch.int32)
        pointer = 0 if weights is None else weights.data_ptr()
        self._table.search(
            (units, length, length), x.data_ptr(), pointer, best, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def search_all(self, chunks: Sequence[tuple[Tensor, Tensor | None]], best: int) -> Tensor:
        """The same with all elements of all chunks as one unit: int32 of shape (1, books, best)."""
        compiled = extension.load()
        assert compiled is not None
        histogram = torch.zeros(2 * self._half, dtype=torch.float64)
        for x, weights in chunks:
            x = x.contiguous()
            weights = None if weights is None else weights.contiguous()
            pointer = 0 if weights is None else weights.data_ptr()
            compiled.add_to_histogram(x.data_ptr(), pointer, x.numel(), self._half, histogram.data_ptr())
        out = torch.empty(1, self._books, best, dtype=torch.int32)
        self._table.search_histogram(histogram.data_ptr(), best, out.data_ptr())
        return out


def coarse(table: Tensor, owners: Sequence[tuple[int, int]]) -> Coarse | None:
    """The table of a coarse search for the kernels; None without them."""
    return None if _ready(table) is None else Coarse(table, owners)
