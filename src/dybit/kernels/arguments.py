"""How tensors and codebooks are passed to the compiled extension, which takes addresses and sizes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats.codebook import Codebook
from dybit.kernels import extension

PerUnit = tuple[int, bool, bool]  # an address (0: none), and whether numbers differ by row and by group
NO_UNITS: PerUnit = (0, False, False)


def kernels_for(*tensors: Tensor | None) -> Any:  # noqa: ANN401  # the extension's module
    """Returns the extension, or None if it is missing or cannot compute with these tensors.

    Tensors must have memory on the CPU, and ``torch.compile`` or ``torch.export`` must not be tracing.
    """
    if torch.compiler.is_compiling():
        return None
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and type(tensor) in (Tensor, torch.nn.Parameter)):
            return None
    return extension.load()


def address(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Checks a tensor and returns its address for the extension, which cannot check types and sizes itself.

    Args:
        name: The tensor's name in the error message.
        tensor: The tensor, or None. It must live as long as the extension uses the address.
        dtype: The type that the extension expects.
        shape: The shape that the extension expects.

    Returns:
        The address; 0 for None.

    Raises:
        DyBitError: The tensor has another type or shape, is not contiguous, or is not on the CPU.
    """
    if tensor is None:
        return 0
    if tensor.dtype is dtype and tensor.is_cpu and tensor.shape == shape and tensor.is_contiguous():
        return tensor.data_ptr()
    raise DyBitError(
        f"{name} must be a contiguous {str(dtype).removeprefix('torch.')} tensor of shape {tuple(shape)} on the CPU, "
        f"not {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
    )


def per_unit(name: str, units: Tensor | None, dtype: torch.dtype, rows: int, groups: int) -> PerUnit:
    """Returns the extension's arguments for a number per tensor, channel or group.

    Args:
        name: The tensor's name in the error message.
        units: Contiguous, of shape (1 or rows, 1 or groups), or None.
        dtype: The type that the extension expects.
        rows: Rows of the matrix.
        groups: Groups of a row.

    Raises:
        DyBitError: The tensor has another type, shape, device or layout.
    """
    if units is None:
        return NO_UNITS
    by_row, by_group = units.shape[:1] != (1,), units.shape[1:] != (1,)
    shape = (rows if by_row else 1, groups if by_group else 1)
    return address(name, units, dtype, shape), by_row, by_group


def choice_per_unit(choice: Tensor | None, rows: int, groups: int, books: int) -> PerUnit:
    """Returns the extension's arguments for the choice of a codebook per tensor, channel or group.

    Raises:
        DyBitError: A choice is not below ``books``, or the tensor has another type, shape, device or layout.
    """
    if choice is not None and choice.numel() and int(choice.max()) >= books:  # choices can come from a damaged file
        raise DyBitError(f"choice must be below {books}, the number of codebooks, but holds {int(choice.max())}")
    return per_unit("choice", choice, torch.uint8, rows, groups)


@lru_cache(maxsize=1024)
def compiled_codebook(book: Codebook) -> Any:  # noqa: ANN401
    """Returns the extension's own object for a codebook."""
    boundaries = torch.from_numpy(book.boundaries(np.float32).astype(np.float32))
    levels = torch.from_numpy(book.levels.astype(np.float32))
    codes = torch.from_numpy(book.level_codes.astype(np.uint8))
    count = len(levels)
    return kernels_for().Codebook(
        address("boundaries", boundaries, torch.float32, (count - 1,)),
        address("levels", levels, torch.float32, (count,)),
        address("codes", codes, torch.uint8, (count,)),
        count,
    )
