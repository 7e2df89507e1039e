"""Transposed convolutions by the kernels, and the operator ``torch.ops.dybit.conv_transposed``.

The kernels compute a product for every place of the inputs, and add the results.

The product has a row for every kernel position and output, and the channels of a group as columns. So weights need one
scale per output, or one for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dybit.kernels import extension
from dybit.kernels.arguments import address
from dybit.kernels.packed_codes import pack
from dybit.operators.conv import layout_of
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.dispatch import read_spec, unwatched
from dybit.operators.images import three
from dybit.operators.input_rounding import InputFormat, InputRounding, input_format
from dybit.operators.packed_cache import LayerSnapshot, PackedCache
from dybit.operators.packed_weight import PackedWeight, pack_choices, supports
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

# x: (batch, channels, *size). weight to tensor_scale: the buffers of a QuantizedTensor; spec: TensorSpec.key.
# input_scale, input_offset, input_format and reach: see InputRounding. places: the size of the results. stride to
# groups: see ConvGeometry. Returns (batch, out_channels, *places) in the layout of x.
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, Tensor? bias, "
    "Tensor? input_scale, Tensor? input_offset, str spec, SymInt[] places, int[] stride, int[] padding, "
    "int[] dilation, int groups, str input_format, float reach) -> Tensor"
)
_FUNCTIONS = {
    1: torch.nn.functional.conv_transpose1d,
    2: torch.nn.functional.conv_transpose2d,
    3: torch.nn.functional.conv_transpose3d,
}
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")
_F32 = torch.float32
_LEAST_CHANNELS = 4  # of a group: with fewer, torch is faster


@dataclass(frozen=True, eq=False)
class _Packed:
    """The extension's own object, and the weights whose addresses it holds."""

    compiled: Any
    parts: list[PackedWeight]
    inputs: InputFormat


_cache = PackedCache[_Packed]()


class PreparedTransposed:
    r"""A transposed convolution prepared for many calls.

    Args:
        weight: Of shape (channels, out_channels / groups, \*kernel).
        bias: Of shape (out_channels,), or None.
        geometry: Stride, padding, dilation and groups. Padding is what is cut off the results.
        rounding: How inputs are rounded. Each sample has one dynamic scale.

    Attributes:
        snapshot: Of the tensors above.
        compiled: The extension's own object; None if the kernels cannot compute it.
        given: Arguments of the extension: the address of the bias; those of scale and offset, and the reach.
    """

    __slots__ = ("_bias", "_geometry", "_kept", "_packed", "_weight", "compiled", "given", "snapshot")

    def __init__(
        self, weight: QuantizedTensor, bias: Tensor | None, geometry: ConvGeometry, rounding: InputRounding
    ) -> None:
        self.snapshot = LayerSnapshot(weight, bias, rounding)
        self._weight, self._bias, self._geometry = weight, bias, geometry
        self._packed = _cache.get(weight, (rounding.format, geometry), lambda: _pack(weight, geometry, rounding.format))
        self.compiled = None if self._packed is None else self._packed.compiled
        if self._packed is None:
            return
        floating = None if bias is None else bias.detach().float().contiguous()
        scale, factor = rounding.scale, self._packed.inputs.factor
        if scale is not None and factor != 1:
            scale = scale * factor
        self._kept = floating, scale, rounding.offset  # the extension holds their addresses
        outputs = (weight.spec.shape[1] * geometry.groups,)
        scales = address("scale", scale, _F32, (1,)), address("offset", rounding.offset, _F32, (1,))
        self.given = address("bias", floating, _F32, outputs), (*scales, rounding.reach / factor)

    def convolve(self, x: Tensor, places: Sequence[int]) -> Tensor | None:
        r"""Convolves, and adds results of overlapping kernels in FP32, in the order of the inputs.

        Args:
            x: Floating point of shape (batch, channels, \*size).
            places: The size of the results.

        Returns:
            float32 of shape (batch, out_channels, \*places), in the layout of ``x``. None if the kernels cannot compute
            it.
        """
        if self.compiled is None or not self._takes(x) or min(places) < 1:
            return None
        layout = layout_of(x)
        planar = layout is torch.contiguous_format
        outputs = self._weight.spec.shape[1] * self._geometry.groups
        y = torch.empty((x.shape[0], outputs, *places), dtype=_F32, device="cpu", memory_format=layout)
        order = range(x.ndim) if planar else (0, *range(2, x.ndim), 1)
        given, to = x.detach().permute(*order).contiguous(), y.permute(*order)
        bias, scale = self.given
        done = self.compiled.run(
            address("x", given, _F32, given.shape),
            x.shape[0],
            three(x.shape[2:]),
            address("y", to, _F32, to.shape),
            three(places),
            bias,
            scale,
            planar,
            torch.get_num_threads(),
        )
        return y if done else None

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernels can convolve ``x``, and the dispatcher can be bypassed."""
        shape = self._weight.spec.shape
        return (
            unwatched(x, self._bias)
            and x.dtype is _F32
            and x.is_cpu
            and x.ndim == len(shape)
            and x.shape[1] == shape[0]
            and x.numel() > 0
        )


def _pack(weight: QuantizedTensor, geometry: ConvGeometry, name: str) -> _Packed | None:
    compiled, spec, inputs = extension.load(), weight.spec, input_format(name)
    groups, taps = geometry.groups, math.prod(spec.shape[2:])
    channels, outputs = spec.shape[0] // groups, spec.shape[1]
    if compiled is None or inputs is None or not supports(spec.family) or spec.groups > 1:
        return None
    if channels < _LEAST_CHANNELS or spec.transposed != groups:
        return None
    shape = (taps * outputs, channels)
    part = TensorSpec(spec.family, shape, "channel", None, "fp32", "channel")
    codes = weight.codes().view(groups, outputs, channels, taps).permute(0, 3, 1, 2).reshape(groups, *shape)
    scale, choice = _by_row(weight.scales(), groups, outputs, taps), _by_row(weight.choices(), groups, outputs, taps)
    parts = []
    for group in range(groups):
        packed = pack(codes[group], spec.bits, None).view(part.packed_shape)
        own = None if choice is None else pack_choices(choice[group], part)
        assert scale is not None  # for type checkers
        parts.append(PackedWeight(QuantizedTensor(part, packed, scale[group], own), inputs))
    if inputs.magnitude_bits == 0 and parts[0].isa == "scalar":  # torch multiplies faster
        return None
    extents = geometry.extents(spec.shape[2:])[:4]
    made = compiled.ConvTransposed([one.compiled for one in parts], extents, spec.shape[0], groups)
    return _Packed(made, parts, inputs)


def _by_row(units: Tensor | None, groups: int, outputs: int, taps: int) -> Tensor | None:
    """Returns the scale or choice of every row of the products: (groups, taps · outputs, 1)."""
    if units is None:
        return None
    return units.expand(groups * outputs, 1).view(groups, 1, outputs).repeat(1, taps, 1).view(groups, -1, 1)


def conv_transposed(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    rounding: InputRounding,
    places: Sequence[int],
) -> Tensor:
    r"""Convolves as one operator of torch.

    Args:
        x: Floating point of shape (batch, channels, \*size).
        weight: As for :class:`PreparedTransposed`.
        bias: As for :class:`PreparedTransposed`.
        geometry: As for :class:`PreparedTransposed`.
        rounding: As for :class:`PreparedTransposed`.
        places: The size of the results.

    Returns:
        Of shape (batch, out_channels, \*places), in the layout of ``x``.
    """
    parts = weight.packed, weight.scale, weight.choice, weight.tensor_scale, bias, rounding.scale, rounding.offset
    laid = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return cast(Tensor, _operator(x, *parts, weight.spec.key, places, *laid, rounding.format, rounding.reach))


def _transposed(x: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401
    *parts, bias, scale, offset, key, places, stride, padding, dilation, groups, name, reach = rest
    weight, rounding = QuantizedTensor(read_spec(key), *parts), InputRounding(name, scale, offset, reach)
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    found = PreparedTransposed(weight, bias, geometry, rounding).convolve(x, places)
    if found is not None:
        return found
    rounded = rounding.round_samples(x)
    values, cut = weight.dequantize(x.dtype), padding[::2]
    ends = zip(x.shape[2:], stride, cut, dilation, values.shape[2:], strict=True)
    plain = [(n - 1) * step - 2 * less + by * (k - 1) + 1 for n, step, less, by, k in ends]
    more = [place - n for place, n in zip(places, plain, strict=True)]
    y: Tensor = _FUNCTIONS[len(places)](
        rounded, values, None if bias is None else bias.to(x.dtype), stride, cut, more, groups, dilation
    )
    return y.contiguous(memory_format=layout_of(x)).clone()


def _shape(x: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401
    shape, places, groups = read_spec(rest[7]).shape, rest[8], rest[12]
    return torch.empty(
        (x.shape[0], shape[1] * groups, *places), dtype=x.dtype, device=x.device, memory_format=layout_of(x)
    )


_LIBRARY.define("conv_transposed" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("conv_transposed", _transposed, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::conv_transposed", _shape, lib=_LIBRARY)
_operator = torch.ops.dybit.conv_transposed
