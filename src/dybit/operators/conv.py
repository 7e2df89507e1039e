"""The operator ``torch.ops.dybit.conv``: convolves rounded inputs with a packed weight, by kernels or plain torch.

As for linear layers (``linear``), the operator takes the portable form, and
the kernel's own layout is kept beside a weight from its first use on. Inside, images are channels-last: inputs that are
so already are used as they are, and their results are so, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.kernels import extension
from dybit.kernels.arguments import address
from dybit.kernels.code_operators import fake_quantize, fake_quantize_dynamic
from dybit.kernels.packed_codes import pack
from dybit.operators import packed_weight
from dybit.operators.linear import Cache, no_view, read_spec
from dybit.tensors.quantized_tensor import QuantizedTensor

# x (batch, channels, *size); weight … tensor_scale as QuantizedTensor stores them, spec being TensorSpec.key; padding
# counts the zeros before and after every dimension in turn. Inputs are rounded to input_format at input_scale and
# input_offset, or at the dynamic scale of every sample, which maps its largest magnitude to reach.
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, Tensor? bias, "
    "Tensor? input_scale, Tensor? input_offset, str spec, int[] stride, int[] padding, int[] dilation, int groups, "
    "str input_format, float reach) -> Tensor"
)
_FUNCTIONS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}
_LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
_F32 = torch.float32
_EXACT = 1 << 24  # up to here FP32 holds every integer
_LEAST_COLUMNS = 8  # of a group: with fewer, and no kernel of its own, torch is faster
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")
_cache = Cache()


class Packed:
    """A convolution as the kernels hold it: a weight for every group, or one table where channels are alone."""

    def __init__(
        self,
        compiled: Any,  # noqa: ANN401
        inputs: packed_weight.InputFormat,
        parts: list[packed_weight.PackedWeight],
        channels: int,
        rows: int,
    ) -> None:
        self.isa = extension.isa()
        self.parts = parts  # kept alive: the extension has their addresses
        self.compiled = compiled  # the extension's own object
        self.channels, self.rows = channels, rows  # of inputs and of results
        self._inputs = inputs

    def run(
        self,
        x: Tensor,
        y: Tensor,
        places: Sequence[int],
        bias: Tensor | None,
        scale: Tensor | None,
        offset: Tensor | None,
        reach: float,
    ) -> bool:
        """Convolves x (batch, *size, channels) into y (batch, *places, rows); False if x holds NaN."""
        factor = self._inputs.factor
        if scale is not None and factor != 1:
            scale = scale * factor
        batch, *size = x.shape[:-1]
        return bool(
            self.compiled.run(
                address("x", x, _F32, (batch, *size, self.channels)),
                batch,
                (1,) * (3 - len(size)) + tuple(size),
                address("y", y, _F32, (batch, *places, self.rows)),
                address("bias", bias, _F32, (self.rows,)),
                address("input_scale", scale, _F32, (1,)),
                address("input_offset", offset, _F32, (1,)),
                reach / factor,
                torch.get_num_threads(),
            )
        )


def extents(
    weight: QuantizedTensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, ...]]:
    """Kernel, stride, dilation, zeros before and after, each for three dimensions."""
    kernel = weight.spec.shape[2:]
    missing = 3 - len(kernel)
    ones, zeros = (1,) * missing, (0,) * missing
    return [
        (*ones, *kernel),
        (*ones, *stride),
        (*ones, *dilation),
        (*zeros, *padding[::2]),
        (*zeros, *padding[1::2]),
    ]


def pack_conv(
    weight: QuantizedTensor,
    extents: list[tuple[int, ...]],
    groups: int,
    inputs: packed_weight.InputFormat | None,
    has_offset: bool,
) -> Packed | None:
    """The convolution for the kernels; None where they cannot do it, or not faster than torch."""
    compiled, spec = extension.load(), weight.spec
    if compiled is None or inputs is None or not packed_weight.supports(spec.family) or spec.transposed:
        return None
    if has_offset and any(map(any, extents[3:])):  # a border of zeros is no multiple of a step from the offset
        return None
    if spec.shape[1] == 1 and groups > 1:
        return _pack_depthwise(weight, extents, groups, inputs)
    if groups > 1 and spec.columns < _LEAST_COLUMNS:
        return None
    permuted = spec.groups == 1 and math.prod(spec.shape[2:]) > 1
    rows = spec.rows // groups
    parts = [packed_weight.PackedWeight(_rows(weight, g * rows, rows, permuted), inputs) for g in range(groups)]
    channels = spec.shape[1] * groups
    made = compiled.Conv([part.compiled for part in parts], extents, channels, groups, not permuted)
    return Packed(made, inputs, parts, channels, spec.rows)


def _rows(weight: QuantizedTensor, start: int, count: int, permuted: bool) -> QuantizedTensor:
    """Some rows of a weight; ``permuted`` with columns by kernel position and then channel."""
    spec = weight.spec
    if count == spec.rows and not permuted:
        return weight
    codes = weight.codes()[start : start + count]
    if permuted:
        codes = codes.view(count, spec.shape[1], -1).transpose(1, 2).reshape(count, spec.columns)
    scale, choice = weight.scales(), weight.choices()
    units = (count, spec.groups)
    part = packed_weight.rows_of(spec, count)
    return QuantizedTensor(
        part,
        pack(codes, spec.bits, spec.group_size).view(part.packed_shape),
        _some(scale, start, units),
        None if choice is None else packed_weight.pack_choices(_some(choice, start, units), part),
    )


def _some(units: Tensor, start: int, shape: tuple[int, int]) -> Tensor:
    """The scales or choices of some rows, one for every group."""
    rows = units if units.shape[0] == 1 else units[start : start + shape[0]]
    return rows.expand(shape).contiguous()


def _pack_depthwise(
    weight: QuantizedTensor, extents: list[tuple[int, ...]], groups: int, inputs: packed_weight.InputFormat
) -> Packed | None:
    compiled, spec = extension.load(), weight.spec
    if spec.rows != groups or spec.groups != 1 or compiled is None:
        return None
    significands, scales = packed_weight.significands(weight)
    largest = packed_weight.max_significand(inputs) * float(significands.abs().sum(1).max())
    if largest >= _EXACT:
        return None
    by_tap = significands.T.contiguous()
    made = compiled.Depthwise(
        address("significands", by_tap, _F32, (spec.columns, groups)),
        address("scales", scales, _F32, (groups,)),
        extents,
        groups,
        inputs.magnitude_bits,
        inputs.max_run,
        inputs.signed,
    )
    return Packed(made, inputs, [], groups, groups)


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
    _check(x, bias, stored, groups, input_format)
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    shape = (x.shape[0], stored.spec.rows, *output_size(x.shape, stored.spec.shape, *geometry))
    packed = None
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.device.type == "cpu" and x.numel():
        key = (input_format, *geometry, groups, input_offset is not None)
        packed = _cache.get(
            stored,
            key,
            lambda: pack_conv(
                stored,
                extents(stored, *geometry),
                groups,
                packed_weight.input_format(input_format),
                input_offset is not None,
            ),
        )
    layout = _layout(x)
    if packed is not None:
        to_last = (0, *range(2, x.ndim), 1)
        given = x.detach().permute(to_last).float().contiguous()
        out = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=layout)
        last = out.permute(to_last)
        direct = out.dtype == torch.float32 and last.is_contiguous()
        y = last if direct else torch.empty(last.shape, dtype=_F32, device="cpu")
        floating = None if bias is None else bias.detach().float().contiguous()
        if y.numel() == 0 or packed.run(given, y, shape[2:], floating, input_scale, input_offset, reach):
            if not direct:
                last.copy_(y)
            return out
    rounded = _round(x, input_scale, input_offset, input_format, reach)
    bias = None if bias is None else bias.to(x.dtype)
    y = convolve(rounded, stored.dequantize(x.dtype), bias, *geometry, groups)
    out = torch.empty_like(y, memory_format=layout)
    return no_view(y) if y.stride() == out.stride() else out.copy_(y)


def _round(x: Tensor, scale: Tensor | None, offset: Tensor | None, input_format: str, reach: float) -> Tensor:
    if scale is not None:
        return cast(Tensor, fake_quantize(x, scale, offset, input_format))
    return cast(Tensor, fake_quantize_dynamic(x.flatten(1), input_format, reach, 0)).view(x.shape)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolves in plain torch, with zeros before and after every dimension in turn."""
    before, after = list(padding[::2]), list(padding[1::2])
    if before != after:
        x = torch.nn.functional.pad(x, _torch_padding(padding))
        before = [0] * len(before)
    function = cast(Any, _FUNCTIONS[weight.ndim - 2])
    return cast(Tensor, function(x, weight, bias, stride, before, dilation, groups))


def _torch_padding(padding: Sequence[int]) -> list[int]:
    """Zeros in the order of ``torch.nn.functional.pad``: the last dimension first."""
    pairs = [padding[i : i + 2] for i in range(0, len(padding), 2)]
    return [n for pair in reversed(pairs) for n in pair]


def output_size(
    shape: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The size of the result, from the shapes of input and weight.

    Raises:
        DyBitError: A sample is empty, or smaller than the kernel.
    """
    padded = [size + padding[2 * i] + padding[2 * i + 1] for i, size in enumerate(shape[2:])]
    reach = [dilation[i] * (size - 1) + 1 for i, size in enumerate(weight[2:])]
    if any(size < need for size, need in zip(padded, reach, strict=True)):
        raise DyBitError(
            f"x must be at least as large as the kernel, which covers {reach}, but is {padded} with padding"
        )
    if any(size == 0 for size in shape[2:]) and shape[0] != 0:
        raise DyBitError(f"x must have no empty dimension besides the batch, but has size {list(shape[2:])}")
    return [(size - need) // step + 1 for size, need, step in zip(padded, reach, stride, strict=True)]


def _layout(x: Tensor) -> torch.memory_format:
    """The layout of the result: that of the input."""
    layout = _LAYOUTS.get(x.ndim - 2)
    if layout is None or x.is_contiguous() or not x.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout


def _check(x: Tensor, bias: Tensor | None, weight: QuantizedTensor, groups: int, input_format: str) -> None:
    shape = weight.spec.shape
    if len(catalogue.family(input_format).books) != 1:
        raise DyBitError(f"input_format must be a single format, not the family {input_format!r}")
    if not x.is_floating_point():
        raise DyBitError(f"x must be floating point, not {x.dtype}")
    if x.ndim != len(shape) or x.shape[1] != shape[1] * groups:
        raise DyBitError(
            f"x must have {len(shape)} dimensions and {shape[1] * groups} channels, but has shape {tuple(x.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.spec.rows,):
        raise DyBitError(f"bias must have shape ({weight.spec.rows},), not {tuple(bias.shape)}")


def _shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401  # as the operator
    _, _, _, _, _, _, spec, stride, padding, dilation = rest[:10]
    shape = read_spec(spec).shape
    size = output_size(x.shape, shape, stride, padding, dilation)
    return torch.empty(x.shape[0], shape[0], *size, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs[1:5])
    ctx.shape, ctx.spec, ctx.has_bias = inputs[0].shape, inputs[8], inputs[5] is not None
    ctx.geometry = inputs[9:13]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """The gradient of inputs and bias; rounding counts as the identity, and codes have none."""
    x_grad = None
    if ctx.needs_input_grad[0]:
        weight = QuantizedTensor(read_spec(ctx.spec), *ctx.saved_tensors).dequantize(grad.dtype)
        stride, padding, dilation, groups = ctx.geometry
        sizes = [n + padding[2 * i] + padding[2 * i + 1] for i, n in enumerate(ctx.shape[2:])]
        padded = grad.new_empty(1).expand(*ctx.shape[:2], *sizes)  # only its shape is used
        zeros = [0] * len(sizes)
        x_grad = torch.ops.aten.convolution_backward(
            grad, padded, weight, None, stride, zeros, dilation, False, zeros, groups, [True, False, False]
        )[0]
        for i, n in enumerate(ctx.shape[2:]):
            x_grad = x_grad.narrow(i + 2, padding[2 * i], n)
    bias_grad = grad.flatten(2).sum((0, 2)) if ctx.has_bias and ctx.needs_input_grad[5] else None
    return x_grad, None, None, None, None, bias_grad, *(None,) * 9


_LIBRARY.define("conv" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("conv", _conv, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::conv", _shape, lib=_LIBRARY)
torch.library.register_autograd("dybit::conv", _backward, setup_context=_save, lib=_LIBRARY)
_operator = torch.ops.dybit.conv


def conv(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    input_format: str,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
    reach: float = 1.0,
) -> Tensor:
    """Convolves inputs, rounded to codes, with a packed weight in one to three dimensions.

    With the compiled kernels the products of significands are summed as integers and scaled in a fixed order; the
    plain-torch path has the same codes and sums their values in floating point. They run where the formats are DyBit's
    or alike; not for borders of zeros with an offset, for several small groups of more than one channel, or where x
    holds NaN. Inputs in channels-last layout are used without a copy, and their results are so laid out.

    Args:
        x: Floating point of shape (batch, channels, *size), or without the batch.
        weight: Of shape (out_channels, channels / groups, *kernel).
        bias: Of shape (out_channels,), or None.
        stride: Of every dimension.
        padding: Zeros before and after every dimension in turn: twice as many numbers.
        dilation: Of every dimension.
        groups: Groups of channels.
        input_format: Name of a single format.
        input_scale: The static scale, float32 of shape (1,); None for a dynamic one for every sample.
        input_offset: The static offset, float32 of shape (1,), or None.
        reach: Dynamic scales map the largest magnitude to this value.

    Returns:
        Of shape (batch, out_channels, *output size) and the type of ``x``.

    Raises:
        DyBitError: ``x`` or ``bias`` has another shape or is not floating point, or ``input_format`` is not one format.
    """
    single = x.ndim == len(weight.spec.shape) - 1
    y = _operator(
        x[None] if single else x,
        weight.packed,
        weight.scale,
        weight.choice,
        weight.tensor_scale,
        bias,
        input_scale,
        input_offset,
        weight.spec.key,
        stride,
        padding,
        dilation,
        groups,
        input_format,
        reach,
    )
    return cast(Tensor, y[0] if single else y)
