"""All steps of a recurrent layer in one call of the kernels, and the operator ``torch.ops.dybit.recurrent``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dybit.kernels import extension
from dybit.kernels.arguments import address
from dybit.operators.dispatch import read_spec, unwatched
from dybit.operators.input_rounding import InputRounding, input_format
from dybit.operators.linear import linear, packed_for
from dybit.tensors.quantized_tensor import QuantizedTensor

CELLS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")  # numbered as in csrc/recurrent.h
# x: (steps, sequences, gates · size), the products with the inputs and their bias. h, and c of an LSTM: (sequences,
# size).
# weight to tensor_scale: the buffers of a QuantizedTensor; spec: TensorSpec.key; bias: of the states. cell: of CELLS.
# Returns h after every step, (steps, sequences, size), and the last states; an empty c if there is none.
SCHEMA = (
    "(Tensor x, Tensor h, Tensor? c, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, "
    "Tensor? bias, str spec, str cell, str input_format, float reach, int group_size, bool reverse) "
    "-> (Tensor, Tensor, Tensor)"
)
_F32 = torch.float32
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")
Step = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]


def recur_steps(
    cell: str,
    x: Tensor,
    counts: Sequence[int],
    states: Sequence[Tensor],
    weight: QuantizedTensor,
    bias: Tensor | None,
    rounding: InputRounding,
    reverse: bool = False,
) -> tuple[Tensor, list[Tensor]] | None:
    """Computes one direction of a layer, after the product with its inputs.

    Sigmoid and tanh are within 2e-7 of the exact functions.

    Args:
        cell: One of :data:`CELLS`.
        x: The products with the inputs and their bias, step by step: (sum of counts, gates · size).
        counts: At each step, the sequences that are computed: the first ones. The states of the others stay.
        states: h, and c of an LSTM: each (sequences, size).
        weight: Of the states: (gates · size, size).
        bias: Of the states: (gates · size,), or None.
        rounding: How the states are rounded; dynamic.
        reverse: Whether the last step is the first.

    Returns:
        h after every step, (sum of counts, size), and the last states. None if the kernels do not support the inputs.
    """
    given = (x, *states)
    if not all(unwatched(one, bias) and one.dtype is _F32 and one.is_cpu for one in given):
        return None
    packed = packed_for(weight, rounding)
    if packed is None or not 0 < max(counts) <= packed.most_rows:
        return None
    size, inputs = weight.spec.columns, input_format(rounding.format)
    wide, rows = weight.spec.rows, sum(counts)
    last = [state.detach().clone(memory_format=torch.contiguous_format) for state in states]
    shape, x = (last[0].shape[0], size), x.detach().contiguous()
    own = None if bias is None else bias.detach().float().contiguous()
    y = torch.empty((rows, size), dtype=_F32, device="cpu")
    extension.load().recur(  # type: ignore[union-attr]  # the weight was packed by it
        CELLS.index(cell),
        packed.compiled,
        address("bias", own, _F32, (wide,)),
        (0, 0, rounding.reach / (inputs.factor if inputs else 1.0)),
        list(counts),
        reverse,
        address("x", x, _F32, (rows, wide)),
        address("h", last[0], _F32, shape),
        address("c", last[1] if len(last) > 1 else None, _F32, shape),
        address("y", y, _F32, (rows, size)),
        torch.get_num_threads(),
    )
    return y, last


def step_of(mode: str, recurrent: Callable[[Tensor], Tensor], projected: Callable[[Tensor], Tensor] | None) -> Step:
    """Computes the next states of a layer from the product with its input and the previous states."""

    def lstm(x: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        h, c = states
        first, forget, cell, out = (x + recurrent(h)).chunk(4, dim=-1)
        c = torch.sigmoid(forget) * c + torch.sigmoid(first) * torch.tanh(cell)
        h = torch.sigmoid(out) * torch.tanh(c)
        return [h if projected is None else projected(h), c]

    def gru(x: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        (h,) = states
        given, own = x.chunk(3, dim=-1), recurrent(h).chunk(3, dim=-1)
        reset, update = (torch.sigmoid(a + b) for a, b in zip(given[:2], own[:2], strict=True))
        new = torch.tanh(given[2] + reset * own[2])
        return [new + update * (h - new)]

    def plain(x: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        y = x + recurrent(states[0])
        return [torch.relu(y) if mode == "RNN_RELU" else torch.tanh(y)]

    return {"LSTM": lstm, "GRU": gru}.get(mode, plain)


def recur_whole(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    weight: QuantizedTensor,
    bias: Tensor | None,
    rounding: InputRounding,
    reverse: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Computes one direction of a layer, all of whose sequences have all steps, as one operator of torch.

    Args:
        cell: One of :data:`CELLS`.
        x: The products with the inputs and their bias: (steps, sequences, gates · size).
        states: As for :func:`recur_steps`.
        weight: As for :func:`recur_steps`.
        bias: As for :func:`recur_steps`.
        rounding: As for :func:`recur_steps`.
        reverse: As for :func:`recur_steps`.

    Returns:
        h after every step, (steps, sequences, size), and the last states.
    """
    parts = weight.packed, weight.scale, weight.choice, weight.tensor_scale
    cells = states[1] if len(states) > 1 else None
    rest = weight.spec.key, cell, rounding.format, rounding.reach, rounding.group_size, reverse
    y, h, c = cast("tuple[Tensor, Tensor, Tensor]", _operator(x, states[0], cells, *parts, bias, *rest))
    return y, [h, c] if len(states) > 1 else [h]


def _recurrent(x: Tensor, h: Tensor, c: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    *parts, bias, spec, cell, name, reach, group_size, reverse = rest
    stored = QuantizedTensor(read_spec(spec), *parts)
    rounding = InputRounding(name, reach=reach, group_size=group_size)
    states = [h] if c is None else [h, c]
    steps, count = x.shape[:2]
    found = None
    if steps and count:
        counts = [count] * steps
        found = recur_steps(cell, x.flatten(0, 1), counts, states, stored, bias, rounding, reverse)
    if found is not None:
        return found[0].unflatten(0, (steps, count)), found[1][0], found[1][1] if c is not None else h.new_empty(0)
    y, step = h.new_empty(steps, *h.shape), step_of(cell, lambda state: linear(state, stored, bias, rounding), None)
    for place in reversed(range(steps)) if reverse else range(steps):
        states = step(x[place], states)
        y[place] = states[0]
    return y, states[0].clone(), states[1].clone() if c is not None else h.new_empty(0)


def _shapes(x: Tensor, h: Tensor, c: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    return h.new_empty(x.shape[0], *h.shape), torch.empty_like(h), h.new_empty(0 if c is None else h.shape)


_LIBRARY.define("recurrent" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("recurrent", _recurrent, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::recurrent", _shapes, lib=_LIBRARY)
_operator = torch.ops.dybit.recurrent
