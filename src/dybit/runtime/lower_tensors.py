"""Rules for elementwise functions, batch norm and softmax of FP32 tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from dybit.runtime.layouts import merge, spread
from dybit.runtime.lowering import Lowering, Place, View

_ATEN = torch.ops.aten
_F32 = torch.float32
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
    _ATEN.clamp_min.default: (-math.inf, math.inf),
    _ATEN.clamp_max.default: (-math.inf, math.inf),
}
_NORMS = (_ATEN.batch_norm.default, _ATEN._native_batch_norm_legit_no_training.default)


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
            **dict.fromkeys(_NORMS, self._batch_norm),
            _ATEN.pow.Tensor_Scalar: self._square,
            _ATEN.softmax.int: self._softmax,
            _ATEN._softmax.default: self._softmax,
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
        kind = unary_number(node)
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
        args = node.args[:2] if node.target is not _ATEN.rsub.Scalar else node.args[1::-1]
        return len(node.args) == 2 and self._of_two(node, _BINARIES[cast(Any, node.target)], args)

    def _square(self, node: fx.Node) -> bool:
        x, exponent = node.args
        return bool(exponent == 2) and self._of_two(node, _BINARIES[_ATEN.mul.Tensor], (x, x))

    def _of_two(self, node: fx.Node, kind: int, args: Sequence[Any]) -> bool:
        low = self._lowering
        tensors = [x for x in args if isinstance(x, fx.Node) and isinstance(low.values[x], Tensor)]
        numbers = [low.values[x] if isinstance(x, fx.Node) else x for x in args if x not in tensors]
        if node.kwargs or not self._takes(node, *tensors) or not all(isinstance(x, int | float) for x in numbers):
            return False
        y = low.values[node]
        operands: list[Any] = []
        for x in args:
            if x in tensors:
                operands.append(low.view(cast(fx.Node, x)))
            else:
                number = low.values[x] if isinstance(x, fx.Node) else x
                operands.append(torch.tensor(number, dtype=_F32, device="cpu"))
        strides = [spread(x.like if isinstance(x, View) else x, y.shape) for x in operands]
        merged = merge(y.shape, [*strides, y.stride()], 3)
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

    def _batch_norm(self, node: fx.Node) -> bool:
        """Scales channels that lie next to each other, and clamps the results if that is their only use."""
        low, whole = self._lowering, node.target is _ATEN.batch_norm.default
        args: tuple[Any, ...] = node.args
        result = node if whole else next((x for x in node.users if x.args[1] == 0), None)
        if result is None or (whole and args[5]) or (not whole and len(node.users) > 1):
            return False
        x, value = low.values[args[0]], low.values[result]
        if not (self._takes(result, args[0]) and x.ndim > 1 and _channels_last(x) and _channels_last(value)):
            return False
        weight, bias, mean, variance = (None if part is None else low.constant(part) for part in args[1:5])
        if mean is None or variance is None or any(a is not None and low.constant(a) is None for a in args[1:3]):
            return False
        factor = (variance.detach().float() + args[-1 - whole]).rsqrt()
        factor = factor if weight is None else factor * weight.detach().float()
        shift = -mean.detach().float() * factor
        shift = shift if bias is None else shift + bias.detach().float()
        users = low.users(result)
        limits = limits_of(users[0]) if len(users) == 1 and users[0].op == "call_function" else None
        taken = [] if result is node else [result]
        if limits is not None and users[0].all_input_nodes == [result]:
            taken = [*taken, users[0]]
        else:
            limits = None
        lowest, highest = limits or (-math.inf, math.inf)
        low.take(taken)
        view, y = low.view(args[0]), low.own(taken[-1] if taken else node)
        low.kept.append((factor, shift))
        rows, columns = x.numel() // x.shape[1], x.shape[1]

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            program.scale_columns(at(view), rows, columns, (at(factor), at(shift), lowest, highest), at(y))

        low.add("batch_norm", node, [view], [y], emit)
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


def clamp_limits(node: fx.Node) -> tuple[float, float] | None:
    """Returns the limits of ``hardtanh``, ``relu6`` or ``clamp`` by numbers; None for other nodes."""
    target: Any = node.target
    if target not in _CLAMPS or node.kwargs:
        return None
    given = [*node.args[1:3], None, None][:2]
    if target is _ATEN.clamp_max.default:
        given.reverse()
    found = [default if x is None else x for x, default in zip(given, _CLAMPS[target], strict=True)]
    numbers = [float(x) for x in found if isinstance(x, int | float)]
    return (numbers[0], numbers[1]) if len(numbers) == 2 and numbers[0] <= numbers[1] else None


def unary_number(node: fx.Node) -> int:
    """Returns the kernels' number of a function of single numbers, or -1."""
    if node.target is _ATEN.gelu.default and node.kwargs.get("approximate") == "tanh":
        return _GELU_TANH
    return _UNARIES.get(cast(Any, node.target), -1)


def limits_of(node: fx.Node) -> tuple[float, float] | None:
    """As :func:`clamp_limits`, for ``relu`` too."""
    return (0.0, math.inf) if node.target is _ATEN.relu.default else clamp_limits(node)


def _channels_last(x: Tensor) -> bool:
    return x.permute(0, *range(2, x.ndim), 1).is_contiguous()


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


def _sorted(x: Tensor) -> Tensor:
    """Returns a tensor with its dimensions in the order of memory."""
    return x.permute(sorted(range(x.ndim), key=lambda d: (x.stride(d), x.shape[d] > 1), reverse=True))
