"""The operator ``torch.ops.dybit.conv``: convolves rounded inputs with a packed weight, by kernels or plain torch.

The operator takes the portable form of the weight. The first call packs it for the kernels and caches the result. The
kernels work on channels-last images and turn contiguous ones while they round inputs and store results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.kernels.transforms import transforming
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.dispatch import check_values, no_view, read_spec, unwatched
from dybit.operators.input_rounding import InputRounding
from dybit.operators.packed_conv import packed_conv_for
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

# x (batch, channels, *size). weight to tensor_scale: the buffers of a QuantizedTensor; spec: TensorSpec.key. stride to
# groups: see ConvGeometry. input_scale, input_offset, input_format and reach: see InputRounding. A dynamic scale
# belongs to one sample.
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, Tensor? bias, "
    "Tensor? input_scale, Tensor? input_offset, str spec, int[] stride, int[] padding, int[] dilation, int groups, "
    "str input_format, float reach) -> Tensor"
)
_LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")


def _conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_choice: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    spec: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_format: str,
    reach: float,
) -> Tensor:
    stored = QuantizedTensor(read_spec(spec), weight, weight_scale, weight_choice, tensor_scale)
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    return _compute(x, stored, bias, geometry, InputRounding(input_format, input_scale, input_offset, reach))


def _compute(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None, geometry: ConvGeometry, rounding: InputRounding
) -> Tensor:
    """Computes the convolution by the kernels or in plain torch, without gradients."""
    _check(x, bias, weight.spec, geometry.groups, rounding.format)
    places = geometry.output_size(x.shape[0], x.shape[2:], weight.spec.shape[2:])
    layout = layout_of(x)
    y = _by_kernel(x, weight, bias, geometry, rounding, places, layout)
    if y is not None:
        return y
    y = _by_torch(x, weight, bias, geometry, rounding)
    out = torch.empty_like(y, memory_format=layout)
    return no_view(y) if y.stride() == out.stride() else out.copy_(y)


def _by_torch(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None, geometry: ConvGeometry, rounding: InputRounding
) -> Tensor:
    rounded = rounding.round_samples(x)
    return geometry.convolve(rounded, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))


def _by_kernel(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    rounding: InputRounding,
    places: Sequence[int],
    layout: torch.memory_format,
) -> Tensor | None:
    """Computes the convolution by the kernels; None if they cannot, for example because ``x`` holds NaN."""
    if x.dtype not in _KERNEL_TYPES or not x.is_cpu or not x.numel():
        return None
    packed = packed_conv_for(weight, geometry, rounding)
    if packed is None:
        return None
    planar = layout is torch.contiguous_format
    order = range(x.ndim) if planar else (0, *range(2, x.ndim), 1)
    given = x.detach().float().permute(*order).contiguous()
    shape = (x.shape[0], weight.spec.rows, *places)
    y = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=layout)
    floating = None if bias is None else bias.detach().float().contiguous()
    if y.numel() and not packed.run(given, y.permute(*order), places, floating, rounding, planar):
        return None
    return y.to(x.dtype)


def layout_of(x: Tensor) -> torch.memory_format:
    """Returns the memory format of the result, which is that of the input."""
    layout = _LAYOUTS.get(x.ndim - 2)
    if layout is None or x.is_contiguous() or not x.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout


def _check(x: Tensor, bias: Tensor | None, spec: TensorSpec, groups: int, input_format: str) -> None:
    shape = spec.shape
    if len(catalogue.family(input_format).books) != 1:
        raise DyBitError(f"input_format must be a single format, not the family {input_format!r}")
    if not x.is_floating_point():
        raise DyBitError(f"x must be floating point, not {x.dtype}")
    if x.ndim != len(shape) or x.shape[1] != shape[1] * groups:
        raise DyBitError(
            f"x must have {len(shape)} dimensions and {shape[1] * groups} channels, but has shape {tuple(x.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (spec.rows,):
        raise DyBitError(f"bias must have shape ({spec.rows},), not {tuple(bias.shape)}")


def _shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401  # as the operator
    _, _, _, bias, _, _, key, *geometry = rest[:11]
    spec = read_spec(key)
    _check(x, bias, spec, geometry[-1], rest[11])
    shape = spec.shape
    size = ConvGeometry.of(*geometry).output_size(x.shape[0], x.shape[2:], shape[2:])
    return torch.empty(x.shape[0], shape[0], *size, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs[1:5])
    ctx.shape, ctx.spec, ctx.has_bias = inputs[0].shape, inputs[8], inputs[5] is not None
    ctx.geometry = inputs[9:13]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Computes the gradients of input and bias. Rounding passes gradients unchanged; codes get none."""
    x_grad = None
    if ctx.needs_input_grad[0]:
        weight = QuantizedTensor(read_spec(ctx.spec), *ctx.saved_tensors).dequantize(grad.dtype)
        x_grad = ConvGeometry.of(*ctx.geometry).input_gradient(grad, ctx.shape, weight)
    bias_grad = grad.flatten(2).sum((0, 2)) if ctx.has_bias and ctx.needs_input_grad[5] else None
    return x_grad, None, None, None, None, bias_grad, *(None,) * 9


_LIBRARY.define("conv" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("conv", _conv, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::conv", _shape, lib=_LIBRARY)
torch.library.register_autograd("dybit::conv", _backward, setup_context=_save, lib=_LIBRARY)
_operator = torch.ops.dybit.conv


def conv(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None, geometry: ConvGeometry, rounding: InputRounding
) -> Tensor:
    r"""Rounds inputs to codes and convolves them with a packed weight, in one to three dimensions.

    The kernels sum products of significands as integers and scale the sums in a fixed order. Plain torch uses the same
    codes and sums their values in floating point. It runs if the kernels do not support a format, if zero padding
    meets an input offset, for several small groups of more than one channel, and if ``x`` holds NaN. If scales are
    dynamic, NaN or infinity in a sample makes all its results NaN. Results of channels-last inputs are channels-last.

    Args:
        x: Floating point of shape (batch, channels, \*size), or without the batch.
        weight: Of shape (out_channels, channels / groups, \*kernel).
        bias: Of shape (out_channels,), or None.
        geometry: Stride, padding, dilation and groups.
        rounding: How inputs are rounded. Each sample has one dynamic scale; the group size is ignored.

    Returns:
        Of shape (batch, out_channels, \*output size) and the type of ``x``.

    Raises:
        DyBitError: ``x`` or ``bias`` has the wrong shape, ``x`` is not floating point, ``rounding`` names a family
            instead of a single format, or the weight has no values.
    """
    if x.ndim == len(weight.spec.shape) - 1:
        return conv(x[None], weight, bias, geometry, rounding)[0]
    check_values(weight.packed, x)
    if unwatched(x, bias):
        return _compute(x, weight, bias, geometry, replace(rounding, group_size=0) if rounding.group_size else rounding)
    if transforming():
        _check(x, bias, weight.spec, geometry.groups, rounding.format)
        return _by_torch(x, weight, bias, geometry, replace(rounding, group_size=0))
    y = _operator(
        x,
        weight.packed,
        weight.scale,
        weight.choice,
        weight.tensor_scale,
        bias,
        rounding.scale,
        rounding.offset,
        weight.spec.key,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        rounding.format,
        rounding.reach,
    )
    return cast(Tensor, y)
