"""A weight in the making: the code of every element, with the scale and the codebook that it has."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dybit.formats.codebook import Family
from dybit.tensors.encoding import pack_codes, unit_rows
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec
from dybit.tensors.scale_search import Scales


class Tables:
    """The codebooks of a family as tables, for rounding many elements at once, each by a codebook of its own.

    Attributes:
        levels: float32 of shape (books · width,); a place in it stands for a codebook and one of its levels.
    """

    def __init__(self, family: Family) -> None:
        books = family.books
        self._width = max(len(book.levels) for book in books)
        self._single = len(books) == 1
        # Levels that a smaller codebook does not have are never found: nothing is above their boundaries.
        self._bounds = torch.full((len(books), self._width - 1), torch.inf, dtype=torch.float32, device="cpu")
        self.levels = torch.zeros(len(books), self._width, dtype=torch.float32, device="cpu")
        self._codes = torch.zeros(len(books), self._width, dtype=torch.uint8, device="cpu")
        for index, book in enumerate(books):
            count = len(book.levels)
            self._bounds[index, : count - 1] = torch.from_numpy(book.boundaries(np.float32))
            self.levels[index, :count] = torch.from_numpy(book.levels)
            self._codes[index, :count] = torch.from_numpy(book.level_codes)
        self.levels = self.levels.view(-1)

    def bounds(self, choice: Tensor) -> Tensor:
        """The boundaries of the codebooks of some elements: (*shape, boundaries)."""
        return self._bounds if self._single else self._bounds[choice]

    def places(self, ratio: Tensor, choice: Tensor, bounds: Tensor) -> Tensor:
        """The places of the levels nearest to some elements.

        Args:
            ratio: float32 of any shape, already divided by the scale.
            choice: The codebook of every element, int64 of the same shape.
            bounds: What :meth:`bounds` returns for ``choice``.

        Returns:
            int64 of the same shape.
        """
        if self._single:
            return torch.bucketize(ratio, bounds[0])
        return torch.searchsorted(bounds, ratio[..., None])[..., 0].add_(choice, alpha=self._width)

    def codes(self, places: Tensor) -> Tensor:
        """The codes at some places: uint8 of the same shape."""
        return self._codes.view(-1)[places]


class Elements:
    """A weight as columns of elements: all tensors are of shape (parts, columns, rows of a part).

    Columns come first since algorithms work column by column, on all rows at once; parts are sets of rows with inputs
    of their own.

    Args:
        matrix: The weight, float32 of shape (rows, columns).
        spec: How it is to be stored.
        scales: Its scales and choices.
        parts: Number of parts.

    Attributes:
        weight: The weight.
        scale: The scale of every element.
        choice: The codebook of every element, int64.
        place: The level of every element (see :class:`Tables`), int64.
        error: The weight less what it is rounded to.
    """

    def __init__(self, matrix: Tensor, spec: TensorSpec, scales: Scales, parts: int) -> None:
        self.spec, self.scales, self.parts = spec, scales, parts
        self.tables = Tables(spec.formats)
        self.weight = self.columns(matrix)
        self.scale = self.columns(unit_rows(scales.scale, spec).expand(matrix.shape))
        choice = scales.scale.new_zeros(1, 1) if scales.choice is None else unit_rows(scales.choice, spec)
        self.choice = self.columns(choice.expand(matrix.shape)).long()
        self.place = torch.zeros_like(self.choice)
        self.error = torch.zeros_like(self.weight)
        self._bounds: Tensor | None = None  # of whole rows, where all their elements have the same codebook
        if scales.choice is None or scales.choice.shape[1] == 1 or spec.choice != "group":
            self._bounds = self.tables.bounds(self.choice[:, 0])

    def columns(self, matrix: Tensor) -> Tensor:
        """(rows, columns) as (parts, columns, rows of a part)."""
        by_part: Tensor = matrix.unflatten(0, (self.parts, -1))
        return by_part.transpose(1, 2).contiguous()

    def rows(self, columns: Tensor) -> Tensor:
        """The inverse of :meth:`columns`."""
        rows: Tensor = columns.transpose(1, 2).flatten(0, 1)
        return rows.contiguous()

    def round(self, column: int, target: Tensor) -> Tensor:
        """Rounds a column to a target, both of shape (parts, rows of a part); returns its new error."""
        choice, scale = self.choice[:, column], self.scale[:, column]
        bounds = self.tables.bounds(choice) if self._bounds is None else self._bounds
        place = self.tables.places(target / scale, choice, bounds)
        self.place[:, column] = place
        error = torch.addcmul(self.weight[:, column], self.tables.levels[place], scale, value=-1)
        self.error[:, column] = error
        return error

    def loss(self, hessian: Tensor) -> float:
        """The squared error of the outputs for a Hessian of shape (parts, columns, columns)."""
        return float((torch.bmm(hessian, self.error) * self.error).sum(dtype=torch.float64))

    def packed(self) -> QuantizedTensor:
        """The quantized weight."""
        return pack_codes(self.tables.codes(self.rows(self.place)), self.spec, self.scales)
