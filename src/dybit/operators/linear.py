"""The operator ``torch.ops.dybit.linear``: inputs times a packed weight, by the kernels or by plain torch.

The operator takes the portable form of the weight. The first call packs it for the kernels and caches the result,
which is never part of a state dict, a copy or a pickle.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels.transforms import transforming
from dybit.operators.dispatch import check_values, no_view, read_spec, unwatched
from dybit.operators.input_rounding import KEPT, InputRounding, input_format
from dybit.operators.packed_cache import PackedCache
from dybit.operators.packed_weight import PackedWeight, supports
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

# x (..., columns) of any floating type. weight to tensor_scale: the buffers of a QuantizedTensor; spec: TensorSpec.key.
# The rest: see InputRounding. Returns (..., rows) of the type of x.
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, Tensor? bias, "
    "Tensor? input_scale, Tensor? input_offset, str spec, str input_format, float reach, int input_group_size) "
    "-> Tensor"
)
_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")
_cache = PackedCache[PackedWeight]()


def packed_for(weight: QuantizedTensor, rounding: InputRounding) -> PackedWeight | None:
    """Returns a weight in the layout of the kernels, packed at the first call; None if they do not support it."""

    def make() -> PackedWeight | None:
        inputs = input_format(rounding.format)
        if inputs is None or not supports(weight.spec.family):
            return None
        return PackedWeight(weight, inputs, rounding.group_size)

    return _cache.get(weight, (rounding.format, rounding.group_size), make)


def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_choice: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    spec: str,
    input_format: str,
    reach: float,
    input_group_size: int,
) -> Tensor:
    stored = QuantizedTensor(read_spec(spec), weight, weight_scale, weight_choice, tensor_scale)
    rounding = InputRounding(input_format, input_scale, input_offset, reach, input_group_size)
    return no_view(_compute(x, stored, bias, rounding))


def _compute(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, rounding: InputRounding) -> Tensor:
    """Computes the product by the kernels or in plain torch, without gradients."""
    _check(x, bias, weight.spec)
    packed = packed_for(weight, rounding) if x.dtype in _KERNEL_TYPES and x.is_cpu else None
    if packed is None:
        return _by_torch(x, weight, bias, rounding)
    rows = x.detach().reshape(-1, x.shape[-1])
    if x.dtype != torch.float32 or not rows.is_contiguous():
        rows = rows.float().contiguous()
    bias = None if bias is None else bias.detach().float().contiguous()
    if rows.shape[0] > packed.most_rows:
        y = torch.nn.functional.linear(rows, packed.dequantize(), bias)
    else:
        y = packed.linear(rows, bias, rounding)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def _by_torch(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, rounding: InputRounding) -> Tensor:
    """Computes with the same codes of inputs and weights; sums their products in floating point."""
    matrix = _matrix(weight, x.dtype)
    return torch.nn.functional.linear(rounding.round(x), matrix, None if bias is None else bias.to(x.dtype))


def _matrix(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The dequantized weight as (rows, columns)."""
    return weight.spec.to_matrix(weight.dequantize(dtype))


def _check(x: Tensor, bias: Tensor | None, spec: TensorSpec) -> None:
    if not x.is_floating_point():
        raise DyBitError(f"x must be floating point, not {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != spec.columns:
        raise DyBitError(f"x must have {spec.columns} columns, but has shape {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (spec.rows,):
        raise DyBitError(f"bias must have shape ({spec.rows},), not {tuple(bias.shape)}")


def _shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401  # as the operator
    _check(x, rest[3], read_spec(rest[6]))
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs[1:5])
    ctx.spec, ctx.has_bias = inputs[8], inputs[5] is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Computes the gradients of input and bias. Rounding passes gradients unchanged; codes get none."""
    x_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = grad @ _matrix(QuantizedTensor(read_spec(ctx.spec), *ctx.saved_tensors), grad.dtype)
    bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[5] else None
    return x_grad, None, None, None, None, bias_grad, None, None, None, None, None, None


_LIBRARY.define("linear" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::linear", _shape, lib=_LIBRARY)
torch.library.register_autograd("dybit::linear", _backward, setup_context=_save, lib=_LIBRARY)
_operator = torch.ops.dybit.linear


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, rounding: InputRounding = KEPT) -> Tensor:
    """Rounds inputs to codes and returns ``x · weightᵀ + bias``.

    The kernels sum products of significands as integers and scale the sums in a fixed order
    (:meth:`dybit.operators.packed_weight.PackedWeight.linear`). Plain torch uses the same codes and sums their values
    in floating point, so the two differ by the rounding of these sums. For half-precision ``x``, plain torch also
    rounds inputs and weights to half precision; the kernels do not. NaN in a row of ``x`` makes the row's results NaN;
    so does infinity if the scale is dynamic. A static scale saturates it.

    Args:
        x: Floating point of shape (..., columns).
        weight: Of shape (rows, columns).
        bias: Of shape (rows,), or None.
        rounding: How inputs are rounded.

    Returns:
        Of shape (..., rows) and the type of ``x``.

    Raises:
        DyBitError: ``x`` or ``bias`` has the wrong shape, ``x`` is not floating point, or the weight has no values.
    """
    check_values(weight.packed, x)
    if unwatched(x, bias):
        return _compute(x, weight, bias, rounding)
    if transforming():
        _check(x, bias, weight.spec)
        return _by_torch(x, weight, bias, rounding)
    return cast(
        Tensor,
        _operator(
            x,
            weight.packed,
            weight.scale,
            weight.choice,
            weight.tensor_scale,
            bias,
            rounding.scale,
            rounding.offset,
            weight.spec.key,
            rounding.format,
            rounding.reach,
            rounding.group_size,
        ),
    )
