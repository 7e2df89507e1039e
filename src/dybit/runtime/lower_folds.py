"""Rules for what makes fewer FP32 numbers of many: pooling, means, sums and norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from dybit.runtime.layouts import is_last, merge
from dybit.runtime.lowering import Lowering, Place

_ATEN = torch.ops.aten
_F32 = torch.float32
_SUM, _MEAN, _NORM = range(3)  # csrc/elementwise.h: Fold

_Merged = tuple[Any, list[Any]]  # sizes, and strides of every operand
_MOST = 1 << 24  # counts up to it are exact in FP32


class FoldRules:
    """Lowers pooling of images, and sums, means and Euclidean norms over dimensions.

    Args:
        lowering: The lowering.
    """

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering
        self.rules = {
            _ATEN.max_pool2d.default: self._max_pool,
            _ATEN.avg_pool2d.default: self._average_pool,
            _ATEN.adaptive_avg_pool2d.default: self._adaptive_pool,
            _ATEN._adaptive_avg_pool2d.default: self._adaptive_pool,
            _ATEN.mean.dim: self._mean,
            _ATEN.sum.dim_IntList: self._sum,
            _ATEN.linalg_vector_norm.default: self._norm,
        }

    def _images(self, node: fx.Node) -> bool:
        """Whether a node makes images of images, both channels-last."""
        given, value = self._lowering.values[cast(fx.Node, node.args[0])], self._lowering.values[node]
        return all(is_last(x) and x.ndim == 4 and x.dtype == _F32 and x.numel() > 0 for x in (given, value))

    def _pool(self, node: fx.Node, name: str, *window: Any) -> bool:  # noqa: ANN401
        """Adds a step of the extension's method ``name`` with its last arguments."""
        low, x = self._lowering, cast(fx.Node, node.args[0])
        given, value = low.values[x], low.values[node]
        sizes = (*value.shape[:2], *given.shape[2:], *value.shape[2:])
        view, y = low.view(x), low.own(node)

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            placed = ((at(v), (v.like.stride(0), v.like.stride(2), v.like.stride(3))) for v in (view, y))
            getattr(program, name)(sizes, *placed, *window)

        low.add(name, node, [view], [y], emit)
        return True

    def _max_pool(self, node: fx.Node) -> bool:
        args: tuple[Any, ...] = node.args
        _, kernel, *rest = args
        stride, padding, dilation = [*rest[:3], *([], 0, 1)[len(rest) :]][:3]
        window = [_pair(part) for part in (kernel, stride or kernel, padding, dilation)]
        return self._images(node) and self._pool(node, "max_pool", window)

    def _average_pool(self, node: fx.Node) -> bool:
        args: tuple[Any, ...] = node.args
        _, kernel, *rest = args
        defaults: tuple[Any, ...] = ([], 0, False, True, None)
        stride, padding, _, padded, divisor = [*rest, *defaults[len(rest) :]]
        window = [_pair(part) for part in (kernel, stride or kernel, padding)]
        return self._images(node) and self._pool(node, "average_pool", window, bool(padded), int(divisor or 0))

    def _adaptive_pool(self, node: fx.Node) -> bool:
        return self._images(node) and self._pool(node, "adaptive_average_pool")

    def _mean(self, node: fx.Node) -> bool:
        return self._fold(node, _MEAN, node.args[1] if len(node.args) > 1 else None)

    def _sum(self, node: fx.Node) -> bool:
        return self._fold(node, _SUM, node.args[1] if len(node.args) > 1 else None)

    def _norm(self, node: fx.Node) -> bool:
        args: tuple[Any, ...] = node.args
        order, dims = [*args[1:3], *(2, None)[len(args) - 1 :]][:2]
        return bool(order == 2) and self._fold(node, _NORM, dims)

    def _fold(self, node: fx.Node, kind: int, dims: Any) -> bool:  # noqa: ANN401
        """Folds over dimensions; None or an empty list: all of them."""
        low, x = self._lowering, cast(fx.Node, node.args[0])
        given, value = low.values[x], low.values[node]
        types = {given.dtype, value.dtype, node.kwargs.get("dtype") or _F32}
        if types != {_F32} or not value.numel() or not given.numel():
            return False
        folded = sorted({d % given.ndim for d in dims} if dims else range(given.ndim))
        kept = [d for d in range(given.ndim) if d not in folded]
        own = [value.stride(d) for d in kept] if value.ndim == given.ndim else value.stride()
        shape, strides = [given.shape[d] for d in kept], [given.stride(d) for d in kept]
        window, steps = [given.shape[d] for d in folded], [given.stride(d) for d in folded]

        def rest(most: int) -> _Merged | None:
            return merge(shape, [strides, own], most)

        rows, columns = rest(1), merge(window, [steps], 1)
        if rows and columns and columns[1][0][0] == 1 and 1 in (rows[0][0], rows[1][1][0]):
            return self._fold_rows(node, kind, (rows[0][0], rows[1][0][0]), columns[0][0])
        whole, places = rest(2), merge(window, [steps], 2)
        if kind == _NORM or whole is None or places is None or not whole[1][0][1] == whole[1][1][1] == 1:
            return False
        return self._fold_places(node, kind, whole, places)

    def _fold_rows(self, node: fx.Node, kind: int, rows: tuple[int, int], columns: int) -> bool:
        """Folds numbers that lie next to each other, given the number of rows and their distance."""
        low = self._lowering
        view, y = low.view(cast(fx.Node, node.args[0])), low.own(node)

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            program.fold_rows(kind, (at(view), rows[1]), rows[0], columns, at(y))

        low.add(_name(node), node, [view], [y], emit)
        return True

    def _fold_places(self, node: fx.Node, kind: int, kept: _Merged, folded: _Merged) -> bool:
        """Folds over up to two dimensions that lie outside of the last one."""
        low = self._lowering
        (images, channels), ((outer, _), (own, _)) = kept
        size, (steps,) = folded
        if max(images, channels, math.prod(size)) > _MOST:
            return False
        view, y = low.view(cast(fx.Node, node.args[0])), low.own(node)
        divisor = math.prod(size) if kind == _MEAN else 1

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            placed = (at(view), (outer, *steps)), (at(y), (own, 0, 0))
            program.average_pool((images, channels, *size, 1, 1), *placed, [size, (1, 1), (0, 0)], False, divisor)

        low.add(_name(node), node, [view], [y], emit)
        return True


def _pair(x: int | Sequence[int]) -> tuple[int, int]:
    """Returns a parameter of height and width."""
    return (x, x) if isinstance(x, int) else (x[0], x[-1])


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1]
