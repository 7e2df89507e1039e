"""Rules for rows: linear layers that share rounded inputs, norms that round their results, attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from dybit.operators.activations import activation_number
from dybit.operators.dispatch import read_spec
from dybit.operators.input_rounding import InputRounding
from dybit.operators.linear import packed_for
from dybit.operators.packed_weight import PackedWeight, Product
from dybit.runtime.layouts import CopyTask, copy_task, dense, rows_of
from dybit.runtime.lowering import Buffer, Lowering, Place, Step, View
from dybit.tensors.quantized_tensor import QuantizedTensor

_ATEN = torch.ops.aten
_F32 = torch.float32
_NONE = (-1, 0)
_NO_ROWS = (_NONE, 0)
_NO_SCALE = (_NONE, _NONE, 1.0)


@dataclass(eq=False)
class _Rounded:
    """Rows of a value, rounded for a weight and those that share its layout."""

    weight: PackedWeight
    product: Product
    key: tuple[Any, ...]
    buffer: Buffer

    def scaled(self, at: Place) -> tuple[Any, ...]:
        """The extension's arguments of scale, offset and reach."""
        _, _, scale, offset, reach = self.product.given
        return (-1, scale), (-1, offset), reach


@dataclass(eq=False)
class _Norm:
    """A norm, and the rows that it rounds."""

    step: Step
    rounded: _Rounded | None = None


class RowRules:
    """Lowers linear layers, norms and attention.

    Args:
        lowering: The lowering.
    """

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering
        self._rounded: dict[fx.Node, list[_Rounded]] = {}
        self._norms: dict[fx.Node, _Norm] = {}
        self.rules = {
            torch.ops.dybit.linear.default: self._linear,
            _ATEN.layer_norm.default: self._layer_norm,
            _ATEN.rms_norm.default: self._rms_norm,
            _ATEN.scaled_dot_product_attention.default: self._attention,
        }

    def _linear(self, node: fx.Node) -> bool:
        low = self._lowering
        args: tuple[Any, ...] = node.args
        x, *state, spec, format, reach, group_size = args
        value, given = low.values[node], low.values[x]
        if not value.numel() or low.view(x).buffer.constant is not None or value.dtype != _F32 or given.dtype != _F32:
            return False
        if copy_task(given.shape, given.stride(), dense(given.shape)) is None:
            return False
        rows = given.numel() // given.shape[-1]
        weight, scale, choice, tensor_scale, bias, input_scale, input_offset = (low.tensor(part) for part in state)
        stored = QuantizedTensor(read_spec(str(spec)), cast(Tensor, weight), cast(Tensor, scale), choice, tensor_scale)
        rounding = InputRounding(str(format), input_scale, input_offset, float(reach), int(group_size))
        packed = packed_for(stored, rounding)
        if packed is None or packed.most_rows < rows:
            return False
        bias = None if bias is None else bias.detach().float().contiguous()
        product = Product(packed, bias, rounding)
        rounded = self._round(cast(fx.Node, x), packed, product, rounding)
        finish = _Finish(low, node)
        y = low.own(finish.result)
        out_rows = cast("tuple[int, int]", rows_of(y.like))
        activation = activation_number(finish.activation)
        low.kept.append((packed, product, weight, scale, choice, tensor_scale))
        given_bias, given_offset = product.given[1], product.given[3]

        def strided(view: View | None, at: Place) -> tuple[Any, int]:
            return _NO_ROWS if view is None else (at(view), cast("tuple[int, int]", rows_of(view.like))[1])

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            parameters = (-1, given_offset), (-1, given_bias), activation
            after = strided(finish.factor, at), strided(finish.addend, at)
            program.multiply(packed.compiled, at(rounded.buffer), rows, *parameters, *after, (at(y), out_rows[1]))

        y.buffer.of_rows = _bytes_of(out_rows[1])
        low.add("linear", finish.result, [rounded.buffer, finish.factor, finish.addend], [y], emit, rows=rows)
        return True

    def _round(self, x: fx.Node, packed: PackedWeight, product: Product, rounding: InputRounding) -> _Rounded:
        """Returns the rounded rows of a value: those that another layer uses, or those of a new step."""
        low, source = self._lowering, self._origin(x)
        key = (
            rounding.format,
            rounding.group_size,
            rounding.reach,
            *(None if part is None else float(part) for part in (rounding.scale, rounding.offset)),
        )
        known = self._rounded.setdefault(source, [])
        for other in known:
            if other.key == key and packed.compiled.shares_rows_with(other.weight.compiled):
                return other
        view = self._in_rows(x)
        rows, stride = cast("tuple[int, int]", rows_of(view.like))
        sized = packed.compiled.rounded_bytes
        made = _Rounded(packed, product, key, Buffer(sized(rows), of_rows=sized))
        known.append(made)
        norm = self._norms.get(source)
        if norm is not None and norm.rounded is None:
            norm.rounded = made
            norm.step.writes = (*norm.step.writes, made.buffer)
            return made

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            program.round_rows(packed.compiled, (at(view), stride), rows, made.scaled(at), at(made.buffer))

        low.add("round", x, [view], [made.buffer], emit, rows=rows)
        return made

    def _in_rows(self, x: fx.Node) -> View:
        """Returns a value, or a contiguous copy of it if it does not consist of rows."""
        low, view = self._lowering, self._lowering.view(x)
        if rows_of(view.like) is not None:
            return view
        like = torch.empty(view.like.shape, dtype=_F32, device="meta")
        copied = View(Buffer(like.numel() * 4, like), like)
        sizes, strides, own = cast(CopyTask, copy_task(like.shape, view.like.stride(), like.stride()))

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            program.copy(sizes, 4, (at(view), strides), (at(copied), own))

        low.add("copy", x, [view], [copied], emit)
        return copied

    def _origin(self, x: fx.Node) -> fx.Node:
        """Returns the value whose rows are those of ``x``, looking through copies and reshapes that keep rows."""
        low = self._lowering
        while True:
            x = low.source(x)
            before = x.all_input_nodes[0] if len(x.all_input_nodes) == 1 else None
            if before is None or not low.has_view(before) or not low.has_view(x):
                return x
            one, other = low.view(x), low.view(before)
            same = (
                one.buffer is other.buffer
                and one.offset == other.offset
                and one.like.shape[-1:] == other.like.shape[-1:]
            )
            if not same or rows_of(one.like) != rows_of(other.like):
                return x
            x = before

    def _layer_norm(self, node: fx.Node) -> bool:
        args: tuple[Any, ...] = node.args
        x, shape, *rest = args
        weight, bias, eps = (*rest, *(None, None, 1e-5)[len(rest) :])[:3]
        return self._norm(node, x, shape, (weight, bias), float(eps), False)

    def _rms_norm(self, node: fx.Node) -> bool:
        args: tuple[Any, ...] = node.args
        x, shape, *rest = args
        weight, eps = (*rest, *(None, None)[len(rest) :])[:2]
        eps = torch.finfo(_F32).eps if eps is None else eps
        return self._norm(node, x, shape, (weight, None), float(eps), True)

    def _norm(
        self, node: fx.Node, x: fx.Node, shape: list[int], affine: tuple[Any, Any], eps: float, square: bool
    ) -> bool:
        low = self._lowering
        like, value = low.values[x], low.values[node]
        rows, out = rows_of(like), rows_of(value)
        parts = [low.constant(part) for part in affine if part is not None]
        if len(shape) != 1 or rows is None or out is None or not value.numel() or value.dtype != _F32:
            return False
        if any(part is None or part.dtype != _F32 or not part.is_contiguous() for part in parts):
            return False
        y, view, columns = low.own(node), low.view(x), shape[0]
        given = [None if part is None else low.view(part) for part in affine]

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            rounded = made.rounded
            after = (None, _NO_SCALE, _NONE)
            if rounded is not None and at(rounded.buffer) != _NONE:  # else nothing reads it
                after = (rounded.weight.compiled, rounded.scaled(at), at(rounded.buffer))
            parameters = (at(given[0]), at(given[1]), eps, square, 0.0)
            program.norm(rows[0], columns, (at(view), rows[1]), _NO_ROWS, _NO_ROWS, parameters, (at(y), out[1]), *after)

        y.buffer.of_rows = _bytes_of(out[1])
        low.add("norm", node, [view], [y], emit, rows=rows[0])
        made = self._norms[node] = _Norm(low.steps[-1])
        return True

    def _attention(self, node: fx.Node) -> bool:
        low = self._lowering
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if given.get("dropout_p"):
            return False
        views = [low.view(given[name]) for name in names[:3]]
        q, k, v = (view.like for view in views)
        value, mask = low.values[node], given.get("attn_mask")
        if any(x.ndim != 4 or x.dtype != _F32 or x.stride(-1) != 1 or not x.numel() for x in (q, k, v, value)):
            return False
        batch, heads, queries, size = q.shape
        if k.shape[0] != batch or v.shape[0] != batch or heads % k.shape[1] or k.shape[1] != v.shape[1]:
            return False
        seen, spread = None, (_NONE, False, (0, 0, 0, 0))
        if mask is not None:
            seen, like = low.view(mask), low.values[mask]
            if like.dtype not in (_F32, torch.bool) or like.ndim > 4:
                return False
            whole = (batch, heads, queries, k.shape[2])
            steps = [0] * (4 - like.ndim) + [
                0 if n == 1 and m != 1 else s
                for n, m, s in zip(like.shape, whole[4 - like.ndim :], like.stride(), strict=True)
            ]
        scale = given.get("scale")
        scale = 1.0 / math.sqrt(size) if scale is None else float(scale)
        sizes = (batch, heads, k.shape[1], queries, k.shape[2], size, v.shape[3])
        causal, out = bool(given.get("is_causal")), low.own(node)

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            given_mask = spread if seen is None else (at(seen), seen.like.dtype is torch.bool, tuple(steps))
            placed = [(at(view), view.like.stride()[:3]) for view in (*views, out)]
            program.attention(*placed[:3], sizes, scale, causal, 0, given_mask, placed[3])

        low.add("attention", node, [*views, seen], [out], emit)
        return True


class _Finish:
    """What a linear layer does with its results before they are stored: the nodes that are their only users.

    Attributes:
        result: The last node taken up.
        activation: The name of the activation, or empty.
        factor: What results are multiplied by, or None.
        addend: What is added to them, or None.
    """

    def __init__(self, lowering: Lowering, node: fx.Node) -> None:
        self._lowering, self.result = lowering, node
        self.activation, self.factor, self.addend = "", cast("View | None", None), cast("View | None", None)
        user = self._user()
        if user is not None and (name := _activation(user)):
            self.activation = name
            self._take(user)
            user = self._user()
        if user is not None and user.target is _ATEN.mul.Tensor and (other := self._other(user)) is not None:
            self.factor = other
            self._take(user)
            user = self._user()
        if (
            user is not None
            and user.target is _ATEN.add.Tensor
            and not user.kwargs
            and (other := self._other(user)) is not None
        ):
            self.addend = other
            self._take(user)

    def _user(self) -> fx.Node | None:
        """Returns the only user of the result, if it has the same shape."""
        low = self._lowering
        users = low.users(self.result)
        if len(users) != 1 or users[0].op != "call_function" or low.is_taken(users[0]):
            return None
        value, before = low.values[users[0]], low.values[self.result]
        same = isinstance(value, Tensor) and value.shape == before.shape and value.stride() == before.stride()
        return users[0] if same and value.dtype == _F32 else None

    def _other(self, user: fx.Node) -> View | None:
        """Returns the other operand of a sum or product, if it has been computed and lies in rows."""
        low = self._lowering
        others = [x for x in user.args if not (isinstance(x, fx.Node) and low.source(x) is self.result)]
        if len(others) != 1 or not isinstance(others[0], fx.Node) or not low.has_view(others[0]):
            return None
        view = low.view(others[0])
        same = view.like.shape == low.values[user].shape and view.like.dtype == _F32
        return view if same and rows_of(view.like) is not None else None

    def _take(self, user: fx.Node) -> None:
        low = self._lowering
        node = next(x for x in user.all_input_nodes if low.source(x) is self.result)
        while node is not self.result:  # copies in between
            low.take([node])
            node = node.all_input_nodes[0]
        low.take([user])
        self.result = user


def _bytes_of(stride: int) -> Callable[[int], int]:
    """Returns the bytes of FP32 rows, which lie ``stride`` elements apart."""
    return lambda rows: rows * stride * 4


def _activation(node: fx.Node) -> str:
    """Returns the kernels' name of an activation; empty if they do not have it."""
    if node.target is _ATEN.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return {_ATEN.relu.default: "relu", _ATEN.silu.default: "silu"}.get(cast(Any, node.target), "")
