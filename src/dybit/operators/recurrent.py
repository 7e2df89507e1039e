"""All steps of a recurrent layer in one call of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dybit.kernels import extension
from dybit.kernels.arguments import address
from dybit.operators.dispatch import unwatched
from dybit.operators.input_rounding import InputRounding, input_format
from dybit.operators.linear import packed_for
from dybit.tensors.quantized_tensor import QuantizedTensor

CELLS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")  # numbered as in csrc/recurrent.h
_F32 = torch.float32


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
