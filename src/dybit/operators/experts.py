"""The operator ``torch.ops.dybit.experts``: multiplies every row by the packed matrix of its expert.

The matrices of all experts are one weight of shape (experts, rows, columns). Each expert that has rows is multiplied
as a linear layer, by the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels.transforms import transforming
from dybit.operators import packed_weight
from dybit.operators.dispatch import check_values, read_spec, unwatched
from dybit.operators.input_rounding import KEPT, InputRounding
from dybit.operators.linear import linear
from dybit.operators.packed_cache import PackedCache
from dybit.tensors.quantized_tensor import QuantizedTensor

# x (n, columns) of any floating type; expert (n,), integers. weight to tensor_scale: the buffers of a QuantizedTensor
# of shape (experts, rows, columns) or, transposed, (experts, columns, rows); spec: TensorSpec.key. An empty
# input_format keeps inputs; else they are rounded at dynamic scales of reach and input_group_size (0: a row).
# Returns (n, rows) of the type of x.
SCHEMA = (
    "(Tensor x, Tensor expert, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, "
    "str spec, str input_format, float reach, int input_group_size) -> Tensor"
)
# The gradient (n, columns) of x from that of the result (n, rows).
GRADIENT_SCHEMA = (
    "(Tensor grad, Tensor expert, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, "
    "str spec) -> Tensor"
)
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")
_cache = PackedCache[list[QuantizedTensor]]()


def matrices(weight: QuantizedTensor) -> list[QuantizedTensor]:
    """Returns the matrix of each expert as a weight of its own. They are made at the first call."""
    kept = _cache.get(weight, (), lambda: _split(weight))
    return _split(weight) if kept is None else kept


def _split(weight: QuantizedTensor) -> list[QuantizedTensor]:
    spec = weight.spec
    part = replace(spec, shape=spec.shape[1:], row_dims=1)
    choices = weight.choices()
    found = []
    for start in range(0, spec.rows, part.rows):
        choice = None
        if choices is not None:
            own = choices if choices.shape[0] == 1 else choices[start : start + part.rows]
            choice = packed_weight.pack_choices(own, part)
        found.append(
            QuantizedTensor(
                part,
                _alias(weight.packed, start, part.rows).view(part.packed_shape),
                weight.scale if weight.scale.shape[0] == 1 else _alias(weight.scale, start, part.rows),
                choice,
                weight.tensor_scale,
            )
        )
    return found


def _alias(tensor: Tensor, start: int, rows: int) -> Tensor:
    """Returns some rows in the same memory. A view would keep the tensor alive, and with it its cached packed form."""
    given = tensor.detach().contiguous()[start : start + rows]
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        given.untyped_storage(), given.storage_offset(), given.shape, given.stride()
    )


def _by_expert(x: Tensor, expert: Tensor, experts: int, rows: int, multiply: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Sorts rows (n, columns) by expert, multiplies, and restores the order: (n, rows). Unknown experts give zeros."""
    order = torch.argsort(expert, stable=True)
    numbers, counts = torch.unique_consecutive(expert.index_select(0, order), return_counts=True)
    parts = []
    given = x.index_select(0, order).split(counts.tolist())
    for number, part in zip(numbers.tolist(), given, strict=True):
        known = 0 <= number < experts
        parts.append(multiply(number, part) if known else x.new_zeros(part.shape[0], rows))
    if not parts:
        return x.new_zeros(0, rows)
    return torch.cat(parts).index_select(0, torch.argsort(order))


def _experts(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_choice: Tensor | None,
    tensor_scale: Tensor | None,
    spec: str,
    input_format: str,
    reach: float,
    input_group_size: int,
) -> Tensor:
    stored = QuantizedTensor(read_spec(spec), weight, weight_scale, weight_choice, tensor_scale)
    rounding = InputRounding(input_format, reach=reach, group_size=input_group_size)
    return _compute(x.detach(), expert, stored, rounding)


def _compute(x: Tensor, expert: Tensor, weight: QuantizedTensor, rounding: InputRounding) -> Tensor:
    """Computes the products, without gradients."""
    parts = matrices(weight)

    def multiply(number: int, rows: Tensor) -> Tensor:
        return linear(rows, parts[number], rounding=rounding)

    return _by_expert(x, expert, len(parts), parts[0].spec.rows, multiply)


def _gradient(
    grad: Tensor,
    expert: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_choice: Tensor | None,
    tensor_scale: Tensor | None,
    spec: str,
) -> Tensor:
    parts = matrices(QuantizedTensor(read_spec(spec), weight, weight_scale, weight_choice, tensor_scale))

    def multiply(number: int, rows: Tensor) -> Tensor:
        return rows @ parts[number].spec.to_matrix(parts[number].dequantize(grad.dtype))

    return _by_expert(grad, expert, len(parts), parts[0].spec.columns, multiply)


def _shape(x: Tensor, expert: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401  # as the operator
    spec = read_spec(rest[4])
    return x.new_empty(x.shape[0], spec.rows // spec.shape[0])


def _gradient_shape(grad: Tensor, expert: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401  # as the operator
    return grad.new_empty(grad.shape[0], read_spec(rest[4]).columns)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs[1:6])
    ctx.spec = inputs[6]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Computes the gradient of the input. Rounding passes gradients unchanged; codes get none."""
    return torch.ops.dybit.experts_gradient(grad, *ctx.saved_tensors, ctx.spec), *(None,) * 9


_LIBRARY.define("experts" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("experts", _experts, "CompositeExplicitAutograd")
_LIBRARY.define("experts_gradient" + GRADIENT_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("experts_gradient", _gradient, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::experts", _shape, lib=_LIBRARY)
torch.library.register_fake("dybit::experts_gradient", _gradient_shape, lib=_LIBRARY)
torch.library.register_autograd("dybit::experts", _backward, setup_context=_save, lib=_LIBRARY)
_operator = torch.ops.dybit.experts


def experts(x: Tensor, expert: Tensor, weight: QuantizedTensor, rounding: InputRounding = KEPT) -> Tensor:
    """Multiplies every row by the matrix of its expert: ``y[i] = weight[expert[i]] · x[i]``.

    Args:
        x: Floating point of shape (n, columns).
        expert: Integers of shape (n,). A number out of range gives a row of zeros.
        weight: Of shape (experts, rows, columns) or, transposed, (experts, columns, rows), with ``row_dims=2``.
        rounding: How inputs are rounded, at dynamic scales.

    Returns:
        Of shape (n, rows) and the type of ``x``.

    Raises:
        DyBitError: A tensor has another shape or type, or the weight has no values.
    """
    if weight.spec.row_dims != 2:
        raise DyBitError(f"weight must be the matrices of experts, not of shape {weight.spec.shape}")
    if not x.is_floating_point() or x.ndim != 2 or x.shape[1] != weight.spec.columns or expert.shape != x.shape[:1]:
        raise DyBitError(
            f"x must be floating point of shape (n, {weight.spec.columns}) and expert of shape (n,), "
            f"not {x.dtype} of shape {tuple(x.shape)} and {tuple(expert.shape)}"
        )
    if rounding.scale is not None:
        raise DyBitError("rounding must be dynamic for experts, but has a static scale")
    check_values(weight.packed, x)
    if unwatched(x) or transforming():
        return _compute(x, expert, weight, rounding)
    return cast(
        Tensor,
        _operator(
            x, expert, weight.packed, weight.scale, weight.choice, weight.tensor_scale, weight.spec.key,
            rounding.format, rounding.reach, rounding.group_size,
        ),
    )  # fmt: skip


def multiply_by_torch(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """Multiplies by floating-point matrices (experts, rows, columns); inputs are not rounded."""
    return _by_expert(
        x,
        expert,
        weight.shape[0],
        weight.shape[1],
        lambda number, rows: torch.nn.functional.linear(rows, weight[number]),
    )


Product = Callable[[Tensor, Tensor], Tensor]


def mix(
    up: Product,
    activation: Callable[[Tensor], Tensor],
    down: Product,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Computes a layer of experts: for every token the weighted sum of its experts' outputs.

    Args:
        up: Multiplies rows (n, hidden) by the first matrices of their experts (n,).
        activation: Applied to the result of ``up``.
        down: Multiplies by the second matrices: (n, hidden).
        hidden_states: Of shape (tokens, hidden).
        top_k_index: The experts of every token, (tokens, k). A number beyond the last expert adds nothing.
        top_k_weights: Their weights, (tokens, k), or those of all experts, (tokens, experts).

    Returns:
        Of the shape and type of ``hidden_states``.
    """
    count = top_k_index.shape[-1]
    expert = top_k_index.reshape(-1)
    x = down(activation(up(hidden_states.repeat_interleave(count, dim=0), expert)), expert)
    if top_k_weights.shape != top_k_index.shape:
        top_k_weights = top_k_weights.gather(1, top_k_index)
    mixed = (x * top_k_weights.reshape(-1, 1)).view(-1, count, x.shape[-1]).sum(dim=1)
    return mixed.to(hidden_states.dtype)
