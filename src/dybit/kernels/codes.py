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

from dybit.errors import DyBitError
from dybit.formats.codebook import Codebook
from dybit.formats.packing import packed_size
from dybit.kernels import extension
from dybit.kernels.extension import address

_LEAST_RUN = 8  # elements that share a scale: with fewer, torch is as fast
_NONE = (0, False, False)
_F32, _U8 = torch.float32, torch.uint8


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
    boundaries = torch.from_numpy(book.boundaries(np.float32).astype(np.float32))
    levels = torch.from_numpy(book.levels.astype(np.float32))
    codes = torch.from_numpy(book.level_codes.astype(np.uint8))
    count = len(levels)
    return compiled.Codebook(
        address("boundaries", boundaries, _F32, (count - 1,)),
        address("levels", levels, _F32, (count,)),
        address("codes", codes, _U8, (count,)),
        count,
    )


def _spread(name: str, units: Tensor | None, dtype: torch.dtype, rows: int, groups: int) -> tuple[int, bool, bool]:
    """A contiguous (rows or 1, groups or 1) tensor, or None, as the kernels are told of it."""
    if units is None:
        return _NONE
    by_row, by_group = units.shape[:1] != (1,), units.shape[1:] != (1,)
    shape = (rows if by_row else 1, groups if by_group else 1)
    return address(name, units, dtype, shape), by_row, by_group


def _chosen(choice: Tensor | None, rows: int, groups: int, books: int) -> tuple[int, bool, bool]:
    """Choices among some codebooks as the kernels are told of them.

    Raises:
        DyBitError: A choice is beyond the codebooks; a file can hold anything.
    """
    if choice is not None and choice.numel() and int(choice.max()) >= books:
        raise DyBitError(f"choice must be below {books}, the number of codebooks, but holds {int(choice.max())}")
    return _spread("choice", choice, _U8, rows, groups)


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
        address("x", given, given.dtype, x.shape),
        address("out", out, given.dtype, x.shape),
        given.dtype == torch.bfloat16,
        (address("scale", scales.view(-1), _F32, (shape[0],)), shape[0] > 1, False),
        0 if offset is None else address("offset", offset.view(-1), _F32, (1,)),
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
        address("x", given, given.dtype, x.shape),
        address("out", out, given.dtype, x.shape),
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
        address("x", x, _F32, (units, length)),
        _spread("scale", scale, _F32, units, 1),
        _chosen(choice, units, 1, len(books)),
        address("out", out, _F32, (units, length)),
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
    shape = (units, length)
    x_grad, slopes = torch.empty_like(x), torch.empty(units, 1, dtype=_F32, device="cpu")
    compiled.pass_through(
        address("ends", ends, _F32, (len(ends), 2)),
        (units, length, length),
        address("x", x, _F32, shape),
        address("grad", grad, _F32, shape),
        address("rounded", rounded, _F32, shape),
        _spread("scale", scale, _F32, units, 1),
        _chosen(choice, units, 1, len(ends)),
        address("x_grad", x_grad, _F32, shape),
        address("slopes", slopes, _F32, (units, 1)),
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
    groups = -(-columns // (group_size or columns))
    size = packed_size(columns, bits, group_size)
    packed = torch.empty(rows, size, dtype=_U8, device="cpu")
    compiled.encode(
        [_book(book) for book in books],
        (rows, columns, min(group_size or columns, columns)),
        bits,
        address("x", x, _F32, (rows, columns)),
        _spread("scale", scale, _F32, rows, groups),
        _chosen(choice, rows, groups, len(books)),
        address("packed", packed, _U8, (rows, size)),
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
) -> Tensor | None:
    """``torch.ops.dybit.dequantize``."""
    compiled = _ready(packed, scale, choice)
    if compiled is None or count == 0 or scale.dtype != torch.float32:
        return None
    packed, scale = packed.contiguous(), scale.contiguous()
    choice = None if choice is None else choice.contiguous()
    rows = packed.shape[0]
    bits, groups = books[0].bits, -(-count // (group_size or count))
    out = torch.empty(rows, count, dtype=_F32, device="cpu")
    compiled.decode(
        address("values", _values(books), _F32, (len(books), 1 << bits)),
        (rows, count, min(group_size or count, count)),
        bits,
        address("packed", packed, _U8, (rows, packed_size(count, bits, group_size))),
        0,
        _spread("scale", scale, _F32, rows, groups),
        _chosen(choice, rows, groups, len(books)),
        address("out", out, _F32, (rows, count)),
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
    out = torch.empty(units, 3, dtype=torch.float64, device="cpu")
    _book(book).fit(
        (units, length, length),
        address("x", x, _F32, (units, length)),
        address("weights", weights, _F32, (units, length)),
        _spread("scale", scale, _F32, units, 1),
        address("out", out, torch.float64, (units, 3)),
        torch.get_num_threads(),
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
        starts = [start for start, _ in owners] + [owners[-1][1]]
        first = torch.tensor(starts, dtype=torch.int32, device="cpu")
        self._books = len(owners)
        self._half = table.shape[0] // 2
        pairs = starts[-1]
        self._table = compiled.CoarseTable(
            address("table", table, _F32, (2 * self._half, pairs)),
            self._half,
            pairs,
            address("first", first, torch.int32, (self._books + 1,)),
            self._books,
        )

    def search(self, x: Tensor, weights: Tensor | None, best: int) -> Tensor:
        """The pairs of the least error of every row and codebook: int32 of shape (units, books, best)."""
        units, length = x.shape
        x = x.contiguous()
        weights = None if weights is None else weights.contiguous()
        out = torch.empty(units, self._books, best, dtype=torch.int32, device="cpu")
        self._table.search(
            (units, length, length),
            address("x", x, _F32, (units, length)),
            address("weights", weights, _F32, (units, length)),
            best,
            address("out", out, torch.int32, (units, self._books, best)),
            torch.get_num_threads(),
        )
        return out

    def search_all(self, chunks: Sequence[tuple[Tensor, Tensor | None]], best: int) -> Tensor:
        """The same with all elements of all chunks as one unit: int32 of shape (1, books, best)."""
        compiled = extension.load()
        assert compiled is not None
        histogram = torch.zeros(2 * self._half, dtype=torch.float64, device="cpu")
        total = address("histogram", histogram, torch.float64, (2 * self._half,))
        for x, weights in chunks:
            x = x.contiguous()
            weights = None if weights is None else weights.contiguous()
            given, importance = address("x", x, _F32, x.shape), address("weights", weights, _F32, x.shape)
            compiled.add_to_histogram(given, importance, x.numel(), self._half, total)
        out = torch.empty(1, self._books, best, dtype=torch.int32, device="cpu")
        self._table.search_histogram(total, best, address("out", out, torch.int32, (1, self._books, best)))
        return out


def coarse(table: Tensor, owners: Sequence[tuple[int, int]]) -> Coarse | None:
    """The table of a coarse search for the kernels; None without them."""
    return None if _ready(table) is None else Coarse(table, owners)
