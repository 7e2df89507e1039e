"""Layouts of tensors in memory, as the kernels take them."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_COPY_DIMENSIONS = 6  # csrc/copy.h
CopyTask = tuple[Any, Any, Any]  # sizes, strides of the operand, strides of the result


def is_last(x: Any) -> bool:  # noqa: ANN401
    """Whether a value is images, channels-last in memory."""
    return isinstance(x, Tensor) and x.ndim in (4, 5) and x.permute(0, *range(2, x.ndim), 1).is_contiguous()


def rows_of(x: Tensor) -> tuple[int, int] | None:
    """Returns the number and the stride of the rows of a tensor that is a matrix of its last dimension; else None."""
    if x.ndim == 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return None
    count = math.prod(x.shape[:-1])
    outer = [(n, step) for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    if not outer:
        return count, x.shape[-1]
    for (_, step), (n, inner) in itertools.pairwise(outer):
        if step != n * inner:
            return None
    return count, outer[-1][1]


def dense(shape: Sequence[int]) -> list[int]:
    """Returns the strides of a contiguous tensor."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def spread(x: Tensor, shape: Sequence[int]) -> list[int]:
    """Returns the strides of a tensor that broadcasts to a shape."""
    missing = len(shape) - x.ndim
    return [0] * missing + [
        0 if n == 1 and m != 1 else s for n, m, s in zip(x.shape, shape[missing:], x.stride(), strict=True)
    ]


def merge(shape: Sequence[int], strides: Sequence[Sequence[int]], most: int) -> tuple[Any, list[Any]] | None:
    """Merges dimensions that lie next to each other in every operand; the last operand decides their order.

    Returns:
        ``most`` sizes, and as many strides of every operand; None if more dimensions are left.
    """
    kept = [(n, *(s[d] for s in strides)) for d, n in enumerate(shape) if n != 1]
    kept.sort(key=operator.itemgetter(-1), reverse=True)
    merged: list[Any] = []
    for n, *steps in kept:
        if merged and all(before == n * step for before, step in zip(merged[-1][1:], steps, strict=True)):
            merged[-1] = (merged[-1][0] * n, *steps)
        else:
            merged.append((n, *steps))
    if len(merged) > most:
        return None
    if not merged:  # a single number
        merged = [(1, *(1 for _ in strides))]
    whole = [(1, *(0 for _ in strides))] * (most - len(merged)) + merged
    columns = list(zip(*whole, strict=True))
    return columns[0], columns[1:]


def copy_task(shape: Sequence[int], given: Sequence[int], own: Sequence[int]) -> CopyTask | None:
    """Returns the arguments of a copy between two layouts; None if they have too many dimensions."""
    merged = merge(shape, [given, own], _COPY_DIMENSIONS)
    return None if merged is None else (merged[0], merged[1][0], merged[1][1])
