"""Pickles float8 tensors as bytes: torch cannot pickle them outside of ``torch.save``."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Float8Bytes:
    """A float8 tensor to be pickled or copied; both restore the tensor.

    Args:
        tensor: The tensor, of an 8-bit floating type.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bytes, (self.tensor.view(torch.uint8), self.tensor.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.tensor, memo)


_KNOWN: WeakValueDictionary[int, Float8Bytes] = WeakValueDictionary()  # one per tensor, so that a pickle keeps sharing


def picklable(value: Any) -> Any:  # noqa: ANN401
    """Returns what to pickle in place of a value: a :class:`Float8Bytes` for a float8 tensor, else the value."""
    if isinstance(value, Tensor) and value.dtype.itemsize == 1 and value.is_floating_point():
        return _KNOWN.setdefault(id(value), Float8Bytes(value))
    return value


def restored(value: Any) -> Any:  # noqa: ANN401
    """Undoes :func:`picklable` in a shallow copy; pickles and deep copies hold the tensor itself."""
    return value.tensor if isinstance(value, Float8Bytes) else value


def _from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data.view(dtype)
