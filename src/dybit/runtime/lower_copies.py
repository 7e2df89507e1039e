"""Rules for what only moves numbers: copies, conversions, concatenation, look-ups in tables, masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from dybit.operators.dispatch import read_spec
from dybit.operators.embedding import PreparedTable
from dybit.runtime.layouts import CopyTask, copy_task, dense, spread
from dybit.runtime.lowering import Buffer, Lowering, Place, View
from dybit.tensors.quantized_tensor import QuantizedTensor

_ATEN = torch.ops.aten
_F32 = torch.float32
_TYPES = {torch.float32: 0, torch.int64: 1, torch.int32: 2, torch.bool: 3}  # csrc/copy.h: Element
_INDICES = (torch.int64, torch.int32)
_COPIES = (
    _ATEN.clone.default,
    _ATEN.contiguous.default,
    _ATEN.reshape.default,
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN.flatten.using_ints,
    _ATEN.unflatten.int,
    _ATEN._to_copy.default,
    _ATEN.to.dtype,
    _ATEN.to.dtype_layout,
    _ATEN.to.device,
    _ATEN.type_as.default,
)
_ANDS = (_ATEN.__and__.Tensor, _ATEN.bitwise_and.Tensor, _ATEN.logical_and.default)


class CopyRules:
    """Lowers copies, conversions, concatenation and look-ups.

    Args:
        lowering: The lowering.
    """

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering
        self.rules: dict[Any, Callable[[fx.Node], bool]] = {
            **dict.fromkeys(_COPIES, self._copy),
            **dict.fromkeys(_ANDS, self._and),
            _ATEN.cat.default: self._cat,
            _ATEN.stack.default: self._stack,
            _ATEN.index.Tensor: self._index,
            _ATEN.embedding.default: self._plain_embedding,
            torch.ops.dybit.embedding.default: self._embedding,
        }

    def _cat(self, node: fx.Node) -> bool:
        low = self._lowering
        parts, value = cast("list[fx.Node]", node.args[0]), low.values[node]
        dim = cast(int, node.args[1]) if len(node.args) > 1 else 0
        parts = [part for part in parts if low.values[part].numel()]
        if not value.numel() or any(
            low.values[part].dtype != value.dtype or low.values[part].ndim != value.ndim for part in parts
        ):
            return False
        starts = itertools.accumulate((low.values[part].shape[dim] for part in parts), initial=0)
        return self._join(node, parts, value.stride(), [start * value.stride(dim) for start in starts])

    def _stack(self, node: fx.Node) -> bool:
        low = self._lowering
        parts, value = cast("list[fx.Node]", node.args[0]), low.values[node]
        dim = (cast(int, node.args[1]) if len(node.args) > 1 else 0) % value.ndim
        if not value.numel() or any(low.values[part].dtype != value.dtype for part in parts):
            return False
        strides = [step for d, step in enumerate(value.stride()) if d != dim]
        return self._join(node, parts, strides, [i * value.stride(dim) for i in range(len(parts))])

    def _join(self, node: fx.Node, parts: Sequence[fx.Node], strides: Sequence[int], starts: Sequence[int]) -> bool:
        """Copies tensors to places of one, each from its start on and with the same strides."""
        low, tasks = self._lowering, []
        for part, start in zip(parts, starts, strict=False):
            like = low.values[part]
            task = copy_task(like.shape, like.stride(), strides)
            if task is None:
                return False
            tasks.append((low.view(part), task, start * like.element_size()))
        y, size = low.own(node), low.values[node].element_size()

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            slot, offset = at(y)
            for view, (sizes, strides, own), before in tasks:
                program.copy(sizes, size, (at(view), strides), ((slot, offset + before), own))

        low.add(str(node.target).split(".")[1], node, [view for view, _, _ in tasks], [y], emit, len(tasks))
        return True

    def _copy(self, node: fx.Node) -> bool:
        """Copies a tensor to its new layout, or converts it to its new type."""
        low = self._lowering
        x, value = cast(fx.Node, node.args[0]), low.values[node]
        given = low.values[x]
        same = value.shape == given.shape
        if not value.numel() or not (same or value.is_contiguous()):
            return False
        # A reshape reads its operand in order.
        task = copy_task(given.shape, given.stride(), value.stride() if same else dense(given.shape))
        return task is not None and self._move(node, x, task)

    def _move(self, node: fx.Node, x: fx.Node, task: CopyTask, start: int = 0) -> bool:
        """Copies or converts from the element ``start`` of ``x`` on."""
        low = self._lowering
        types = low.values[x].dtype, low.values[node].dtype
        if types[0] != types[1] and not set(types) <= _TYPES.keys():
            return False
        view, y = low.view(x), low.own(node)
        size, before = y.like.element_size(), start * low.values[x].element_size()
        sizes, strides, own = task

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            slot, offset = at(view)
            source, result = ((slot, offset + before), strides), (at(y), own)
            if types[0] == types[1]:
                program.copy(sizes, size, source, result)
            else:
                program.convert(sizes, _TYPES[types[0]], source, _TYPES[types[1]], result)

        low.add("copy" if types[0] == types[1] else "convert", node, [view], [y], emit)
        return True

    def _index(self, node: fx.Node) -> bool:
        """Copies elements whose places are known and lie at even distances, as those of a mask by positions do."""
        low, x = self._lowering, cast(fx.Node, node.args[0])
        given, value = low.values[x], low.values[node]
        indices = [low.constant(index) for index in cast("list[Any]", node.args[1])]
        known = [index.long().numpy() for index in indices if index is not None and index.dtype in _INDICES]
        if len(known) < len(indices) or not value.numel():
            return False
        places: Any = np.int64(0)
        for index, n, step in zip(known, given.shape, given.stride(), strict=False):
            if int(index.min()) < -n or int(index.max()) >= n:
                return False  # torch names the index
            places = places + np.where(index < 0, index + n, index) * step
        start = int(places.flat[0])
        steps = [int(places.take(1, d).flat[0]) - start if n > 1 else 0 for d, n in enumerate(places.shape)]
        even = sum((i * step for i, step in zip(np.ogrid[tuple(map(slice, places.shape))], steps, strict=True)), start)
        if min(steps, default=0) < 0 or not np.array_equal(np.broadcast_to(even, places.shape), places):
            return False
        task = copy_task(value.shape, [*steps, *given.stride()[len(known) :]], value.stride())
        return task is not None and self._move(node, x, task, start)

    def _and(self, node: fx.Node) -> bool:
        """Copies an operand if the other is known to be true everywhere."""
        low = self._lowering
        operands, value = node.all_input_nodes, low.values[node]
        known = [x for x in operands if (made := low.constant(x)) is not None and bool(made.all())]
        if len(operands) != 2 or not known or value.dtype != torch.bool or not value.numel():
            return False
        x = operands[operands[0] is known[0]]
        task = copy_task(value.shape, spread(low.values[x], value.shape), value.stride())
        return low.values[x].dtype == torch.bool and task is not None and self._move(node, x, task)

    def _plain_embedding(self, node: fx.Node) -> bool:
        low = self._lowering
        table, index = cast("tuple[fx.Node, fx.Node]", node.args[:2])
        values = low.constant(table)
        if values is None or values.dtype != _F32 or not values.is_contiguous():
            return False
        view, (rows, columns) = low.view(table), values.shape

        def emit(program: Any, at: Place, indices: Any, count: int, y: View) -> None:  # noqa: ANN401
            program.look_up_plain(at(view), rows, columns, at(indices), count, at(y))

        return self._look_up(node, index, emit)

    def _embedding(self, node: fx.Node) -> bool:
        low = self._lowering
        args: tuple[Any, ...] = node.args
        index, *state, spec = args
        weight, scale, choice, tensor_scale = (low.tensor(part) for part in state)
        assert weight is not None and scale is not None  # for type checkers
        table = PreparedTable(QuantizedTensor(read_spec(str(spec)), weight, scale, choice, tensor_scale))
        if table.compiled is None:
            return False
        low.kept.append(table)

        def emit(program: Any, at: Place, indices: Any, count: int, y: View) -> None:  # noqa: ANN401
            program.look_up(table.compiled, at(indices), count, at(y))

        return self._look_up(node, index, emit)

    def _look_up(self, node: fx.Node, index: fx.Node, emit_look_up: Callable[..., None]) -> bool:
        """Looks up rows, by indices that are converted to int64 in a row before if they are something else."""
        low = self._lowering
        given, value = low.values[index], low.values[node]
        task = copy_task(given.shape, given.stride(), dense(given.shape))
        if not value.numel() or not value.is_contiguous() or task is None or given.dtype not in _INDICES:
            return False
        view, y, count = low.view(index), low.own(node), given.numel()
        indices: Buffer | View = view
        if given.dtype != torch.int64 or not given.is_contiguous():
            indices = converted = Buffer(count * 8)

            def emit_index(program: Any, at: Place) -> None:  # noqa: ANN401
                sizes, strides, own = task
                before, after = (at(view), strides), (at(converted), own)
                program.convert(sizes, _TYPES[given.dtype], before, _TYPES[torch.int64], after)

            low.add("convert", index, [view], [converted], emit_index)

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            emit_look_up(program, at, indices, count, y)

        low.add("embedding", node, [indices], [y], emit)
        return True
