"""Rules for elementwise functions, softmax, concatenation and copies of FP32 tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from dybit.runtime.lowering import Lowering, Place, View, is_last

_ATEN = torch.ops.aten
_F32 = torch.float32
_DIMENSIONS = 6  # csrc/copy.h
# Numbers of csrc/elementwise.h.
_UNARIES = {
    _ATEN.relu.default: 0,
    _ATEN.neg.default: 1,
    _ATEN.abs.default: 2,
    _ATEN.sqrt.default: 3,
    _ATEN.rsqrt.default: 4,
    _ATEN.exp.default: 5,
    _ATEN.sigmoid.default: 6,
    _ATEN.tanh.default: 7,
    _ATEN.silu.default: 8,
    _ATEN.gelu.default: 9,
    _ATEN.hardsigmoid.default: 12,
    _ATEN.hardswish.default: 13,
}
_GELU_TANH = 10
_BINARIES = {
    _ATEN.add.Tensor: 0,
    _ATEN.sub.Tensor: 1,
    _ATEN.rsub.Scalar: 1,
    _ATEN.mul.Tensor: 2,
    _ATEN.div.Tensor: 3,
}
_CLAMPS = {  # with the limits that they have by default
    _ATEN.hardtanh.default: (-1.0, 1.0),
    _ATEN.relu6.default: (0.0, 6.0),
    _ATEN.clamp.default: (-math.inf, math.inf),
}
_COPIES = (
    _ATEN.clone.default,
    _ATEN.contiguous.default,
    _ATEN.reshape.default,
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
)


class TensorRules:
    """Lowers functions of FP32 tensors.

    Args:
        lowering: The lowering.
    """

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering
        self.rules = {
            **dict.fromkeys(_UNARIES, self._unary),
            **dict.fromkeys(_BINARIES, self._binary),
            **dict.fromkeys(_CLAMPS, self._clamp),
            **dict.fromkeys(_COPIES, self._copy),
            _ATEN.softmax.int: self._softmax,
            _ATEN._softmax.default: self._softmax,
            _ATEN.cat.default: self._cat,
            _ATEN.max_pool2d.default: self._max_pool,
        }

    def _takes(self, node: fx.Node, *operands: Any) -> bool:  # noqa: ANN401
        """Whether a node computes FP32 from FP32."""
        low = self._lowering
        return all(
            isinstance(x, Tensor) and x.dtype == _F32 and x.numel() > 0
            for x in (low.values[node], *(low.values[x] for x in operands))
        )

    def _same(self, node: fx.Node) -> tuple[View, View] | None:
        """Returns the operand and the result of a function of one tensor, if they lie alike without gaps."""
        low = self._lowering
        if not self._takes(node, node.args[0]):
            return None
        given = cast(fx.Node, node.args[0])
        x, y = low.values[given], low.values[node]
        if x.shape != y.shape or x.stride() != y.stride() or not _sorted(y).is_contiguous():
            return None
        return low.view(given), low.own(node)

    def _unary(self, node: fx.Node) -> bool:
        kind = _UNARIES[cast(Any, node.target)]
        if node.target is _ATEN.gelu.default and node.kwargs.get("approximate") == "tanh":
            kind = _GELU_TANH
        found = self._same(node)
        if found is None:
            return False
        x, y = found
        count = y.like.numel()

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            program.unary(kind, at(x), count, at(y))

        self._lowering.add(_name(node), node, [x], [y], emit)
        return True

    def _clamp(self, node: fx.Node) -> bool:
        limits = clamp_limits(node)
        if limits is None or (found := self._same(node)) is None:
            return False
        x, y = found
        count, (lowest, highest) = y.like.numel(), limits

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            program.clamp(at(x), count, lowest, highest, at(y))

        self._lowering.add(_name(node), node, [x], [y], emit)
        return True

    def _binary(self, node: fx.Node) -> bool:
        low, kind = self._lowering, _BINARIES[cast(Any, node.target)]
        args = node.args[:2] if node.target is not _ATEN.rsub.Scalar else node.args[1::-1]
        tensors = [x for x in args if isinstance(x, fx.Node) and isinstance(low.values[x], Tensor)]
        numbers = [low.values[x] if isinstance(x, fx.Node) else x for x in args if x not in tensors]
        if (
            node.kwargs
            or len(node.args) > 2
            or not self._takes(node, *tensors)
            or not all(isinstance(x, int | float) for x in numbers)
        ):
            return False
        y = low.values[node]
        operands: list[Any] = []
        for x in args:
            if x in tensors:
                operands.append(low.view(cast(fx.Node, x)))
            else:
                number = low.values[x] if isinstance(x, fx.Node) else x
                operands.append(torch.tensor(number, dtype=_F32, device="cpu"))
        strides = [_spread(x.like if isinstance(x, View) else x, y.shape) for x in operands]
        merged = _merge(y.shape, [*strides, y.stride()], 3)
        if merged is None:
            return False
        sizes, (one, other, own) = merged
        if own[-1] != 1 or not {one[-1], other[-1]} <= {0, 1}:
            return False
        result = low.own(node)
        low.kept.append(operands)

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            program.binary(kind, sizes, (at(operands[0]), one), (at(operands[1]), other), (at(result), own))

        low.add(_name(node), node, [x for x in operands if isinstance(x, View)], [result], emit)
        return True

    def _softmax(self, node: fx.Node) -> bool:
        low = self._lowering
        x, dim = cast(fx.Node, node.args[0]), cast(int, node.args[1])
        if not self._takes(node, x) or node.kwargs or (len(node.args) > 2 and node.args[2]):
            return False
        given, value = low.values[x], low.values[node]
        if dim not in (-1, given.ndim - 1) or not given.is_contiguous() or not value.is_contiguous():
            return False
        view, y, columns = low.view(x), low.own(node), value.shape[-1]
        rows = value.numel() // columns

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            program.softmax(at(view), rows, columns, at(y))

        low.add("softmax", node, [view], [y], emit)
        return True

    def _max_pool(self, node: fx.Node) -> bool:
        low = self._lowering
        args: tuple[Any, ...] = node.args
        x, kernel, *rest = args
        stride, padding, dilation = (*rest[:3], *([], 0, 1)[len(rest) :])[:3]
        window = [_pair(part) for part in (kernel, stride or kernel, padding, dilation)]
        given, value = low.values[x], low.values[node]
        if not self._takes(node, x) or given.ndim != 4 or not (is_last(given) and is_last(value)):
            return False
        sizes = (value.shape[0], value.shape[1], *given.shape[2:], *value.shape[2:])
        view, y = low.view(x), low.own(node)

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            placed = ((at(v), (v.like.stride(0), v.like.stride(2), v.like.stride(3))) for v in (view, y))
            program.max_pool(sizes, *placed, window)

        low.add("max_pool", node, [view], [y], emit)
        return True

    def _cat(self, node: fx.Node) -> bool:
        low = self._lowering
        parts, value = cast("list[fx.Node]", node.args[0]), low.values[node]
        dim = cast(int, node.args[1]) if len(node.args) > 1 else 0
        parts = [part for part in parts if low.values[part].numel()]
        if not value.numel() or any(
            low.values[part].dtype != value.dtype or low.values[part].ndim != value.ndim for part in parts
        ):
            return False
        tasks, start = [], 0
        for part in parts:
            like = low.values[part]
            copy = _copy_task(like.shape, like.stride(), value.stride())
            if copy is None:
                return False
            tasks.append((low.view(part), copy, start * value.stride(dim) * value.element_size()))
            start += like.shape[dim]
        y, size = low.own(node), value.element_size()

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            slot, offset = at(y)
            for view, (sizes, strides, own), before in tasks:
                program.copy(sizes, size, at(view), strides, (slot, offset + before), own)

        low.add("cat", node, [view for view, _, _ in tasks], [y], emit, len(tasks))
        return True

    def _copy(self, node: fx.Node) -> bool:
        """Copies a tensor to its new layout."""
        low = self._lowering
        x, value = cast(fx.Node, node.args[0]), low.values[node]
        given = low.values[x]
        same = value.shape == given.shape
        if not value.numel() or value.dtype != given.dtype or not (same or value.is_contiguous()):
            return False
        # A reshape reads its operand in order.
        task = _copy_task(given.shape, given.stride(), value.stride() if same else _dense(given.shape))
        if task is None:
            return False
        view, y, size = low.view(x), low.own(node), value.element_size()

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            sizes, strides, own = task
            program.copy(sizes, size, at(view), strides, at(y), own)

        low.add("copy", node, [view], [y], emit)
        return True


def clamp_limits(node: fx.Node) -> tuple[float, float] | None:
    """Returns the limits of ``hardtanh``, ``relu6`` or ``clamp`` by numbers; None for other nodes."""
    target: Any = node.target
    if target not in _CLAMPS or node.kwargs:
        return None
    given = [*node.args[1:3], None, None][:2]
    found = [default if x is None else x for x, default in zip(given, _CLAMPS[target], strict=True)]
    numbers = [float(x) for x in found if isinstance(x, int | float)]
    return (numbers[0], numbers[1]) if len(numbers) == 2 and numbers[0] <= numbers[1] else None


def _pair(x: int | list[int]) -> tuple[int, int]:
    """Returns a parameter of height and width."""
    return (x, x) if isinstance(x, int) else (x[0], x[-1])


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


def _sorted(x: Tensor) -> Tensor:
    """Returns a tensor with its dimensions in the order of memory."""
    return x.permute(sorted(range(x.ndim), key=lambda d: (x.stride(d), x.shape[d] > 1), reverse=True))


def _dense(shape: Sequence[int]) -> list[int]:
    """Returns the strides of a contiguous tensor."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _spread(x: Tensor, shape: Sequence[int]) -> list[int]:
    """Returns the strides of a tensor that broadcasts to a shape."""
    missing = len(shape) - x.ndim
    return [0] * missing + [
        0 if n == 1 and m != 1 else s for n, m, s in zip(x.shape, shape[missing:], x.stride(), strict=True)
    ]


def _merge(shape: Sequence[int], strides: Sequence[Sequence[int]], most: int) -> tuple[Any, list[Any]] | None:
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


def _copy_task(shape: Sequence[int], given: Sequence[int], own: Sequence[int]) -> tuple[Any, Any, Any] | None:
    merged = _merge(shape, [given, own], _DIMENSIONS)
    return None if merged is None else (merged[0], merged[1][0], merged[1][1])
