"""The operator ``torch.ops.dybit.conv_image``: convolves an image of significands.

It adds, clamps, and returns floating point, the next image, or both. Codes and sums are those of ``conv``, so a chain
of images gives the same bits as its layers one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels.arguments import address, kernels_for
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.dispatch import read_spec
from dybit.operators.images import (
    ImageFormat,
    Rounded,
    UnknownError,
    channels_last,
    decode_image,
    encode_image,
    image_format,
    three,
)
from dybit.operators.input_rounding import InputRounding
from dybit.operators.packed_conv import packed_conv_for
from dybit.tensors.quantized_tensor import QuantizedTensor

# stride to groups: see ConvGeometry. format and border of images: see ImageFormat.
SCHEMA = (
    "(Tensor image, Tensor? addend, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, "
    "Tensor? bias, Tensor scale, Tensor? offset, Tensor? out_scale, Tensor? out_offset, str spec, int[] stride, "
    "int[] padding, int[] dilation, int groups, "
    "str format, int[] border, float low, float high, bool keep, str out_format, int[] out_border) -> (Tensor, Tensor)"
)
_F32 = torch.float32
_NO_IMAGE = (1, (0, 0, 0), (0, 0, 0), 0, 0)
_NO_ROUNDING: Rounded = (1, 1, True, 1.0, 0.0)
_INFINITY = float("inf")
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")


class PreparedConv:
    """A convolution of images of one shape, prepared before the first image.

    Args:
        shape: Of the image.
        weight: Of shape (out_channels, channels / groups, *kernel).
        bias: Of shape (out_channels,), or None.
        geometry: Stride, padding, dilation and groups. The padding is at most the border.
        rounding: Format, static scale and offset of the image. With a border, 0 must have a code.
        border: The border of the image.
        out: Format, static scale and offset of the next image; None to make no image.
        out_border: The border of the next image.
        limits: The lowest and the highest result; others are clamped.
        keep: Whether to return the results in floating point.

    Raises:
        DyBitError: Shapes do not fit each other, or a static scale is missing.
    """

    def __init__(
        self,
        shape: Sequence[int],
        weight: QuantizedTensor,
        bias: Tensor | None,
        geometry: ConvGeometry,
        rounding: InputRounding,
        border: Sequence[int],
        out: InputRounding | None = None,
        out_border: Sequence[int] = (),
        limits: tuple[float, float] = (-_INFINITY, _INFINITY),
        keep: bool = True,
    ) -> None:
        self.shape = tuple(shape)
        self._weight, self._geometry, self._rounding, self._out = weight, geometry, rounding, out
        self._limits, self._keep = limits, keep
        self._made = image_format(rounding.format, tuple(border))
        self._channels = weight.spec.shape[1] * geometry.groups
        size, places = self._sizes()
        batch, outputs = shape[0], weight.spec.shape[0]
        self._results = (batch, outputs, *places)
        self._last = (batch, *places, outputs)
        self._y = self._last if keep else (0,)
        self._to_first = (0, len(places) + 1, *range(1, len(places) + 1))
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self._next: ImageFormat | None = None
        self._image: tuple[int, ...] = (0,)
        self._target: tuple[Any, ...] = _NO_IMAGE
        self._rounded, self._image_dtype = _NO_ROUNDING, self._made.dtype
        if out is not None:
            self._next = image_format(out.format, tuple(out_border))
            self._image, self._image_dtype = self._next.shape(batch, outputs, places), self._next.dtype
            self._target = (*self._next.layout, outputs, self._image[-1])
            self._rounded = self._next.rounded(out)
        self._packed = packed_conv_for(weight, geometry, rounding)
        self._source = (*self._made.layout, self._channels, shape[-1])
        scale = self._made.rounded(rounding)[3]
        self._call = (batch, three(size), scale)

    def _sizes(self) -> tuple[tuple[int, ...], list[int]]:
        """Returns the size of the image without its border, and the size of the results."""
        spec, border = self._weight.spec, self._made.border
        if len(self.shape) != len(spec.shape):
            raise DyBitError(f"image must have {len(spec.shape)} dimensions, not shape {self.shape}")
        if any(a > b for a, b in zip(self._geometry.padding, border, strict=True)):
            raise DyBitError(f"padding must be at most the border {border}, not {self._geometry.padding}")
        size = self._made.size(self.shape)
        places = self._geometry.output_size(self.shape[0], size, spec.shape[2:])
        if self.shape != self._made.shape(self.shape[0], self._channels, size):
            raise DyBitError(f"image must be of {self._channels} channels, but has shape {self.shape}")
        return size, places

    def run(self, image: Tensor, addend: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolves an image, adds, clamps, and rounds.

        Args:
            image: Significands of the shape.
            addend: Floating point that broadcasts to the results, or None.

        Returns:
            The results, channels-last float32 of shape (batch, out_channels, *size), and the next image. Either is an
            empty tensor if it was not requested.

        Raises:
            UnknownError: A result to be rounded is NaN, or ``addend`` has a larger shape than the results.
            DyBitError: ``image`` does not have the prepared type and shape.
        """
        if image.dtype != self._made.dtype or image.shape != self.shape or not image.is_contiguous():
            raise DyBitError(
                f"image must be contiguous {self._made.dtype} of shape {self.shape}, "
                f"not {image.dtype} of shape {tuple(image.shape)}"
            )
        if addend is not None:
            addend = _spread(addend, self._results)
        if self._packed is None or kernels_for(image) is None or image.numel() == 0:
            return self._by_torch(image, addend)
        last = None if addend is None else channels_last(addend)
        y = torch.empty(self._y, dtype=_F32, device="cpu")
        result = torch.empty(self._image, dtype=self._image_dtype, device="cpu")
        done = self._packed.compiled.run_image(
            (address("image", image, self._made.dtype, self.shape), *self._source),
            *self._call,
            address("offset", self._rounding.offset, _F32, (1,)),
            address("bias", self._bias, _F32, self._results[1:2]),
            address("y", y, _F32, self._y) if self._keep else 0,
            address("addend", last, _F32, self._last),
            *self._limits,
            (address("result", result, self._image_dtype, self._image) if self._next else 0, *self._target),
            self._rounded,
            torch.get_num_threads(),
        )
        if not done:
            return self._by_torch(image, addend)
        return y.permute(self._to_first) if self._keep else y, result

    def _by_torch(self, image: Tensor, addend: Tensor | None) -> tuple[Tensor, Tensor]:
        """Computes the same in plain torch: the same codes, with products summed in floating point."""
        x = decode_image(image, self._channels, self._made, self._rounding)
        y = self._geometry.convolve(x, self._weight.dequantize(torch.float32), self._bias)
        if addend is not None:
            y = y + addend.float()
        y = y.clamp(*self._limits)
        result = torch.empty(self._image, dtype=self._image_dtype, device=image.device)
        if self._next is not None and self._out is not None:
            result = encode_image(y, self._next, self._out)
        if not self._keep:
            return y.new_empty(0), result
        return y.permute(0, *range(2, y.ndim), 1).contiguous().permute(self._to_first), result


def _spread(addend: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(addend.shape) == shape:
        return addend
    try:
        return addend.expand(shape)
    except RuntimeError:
        raise UnknownError(f"addend must broadcast to {shape}, not have shape {tuple(addend.shape)}") from None


def _conv(
    image: Tensor,
    addend: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_choice: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    out_scale: Tensor | None,
    out_offset: Tensor | None,
    spec: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    format: str,
    border: Sequence[int],
    low: float,
    high: float,
    keep: bool,
    out_format: str,
    out_border: Sequence[int],
) -> tuple[Tensor, Tensor]:
    stored = QuantizedTensor(read_spec(spec), weight, weight_scale, weight_choice, tensor_scale)
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    rounding = InputRounding(format, scale, offset)
    out = InputRounding(out_format, out_scale, out_offset) if out_format else None
    made = PreparedConv(image.shape, stored, bias, geometry, rounding, border, out, out_border, (low, high), keep)
    return made.run(image, addend)


def _conv_shape(image: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401  # as the operator
    spec, stride, padding, dilation, _, name, border, _, _, keep, out_format, out_border = rest[10:]
    shape = read_spec(spec).shape
    size = ImageFormat(name, tuple(border)).size(image.shape)
    places = ConvGeometry.of(stride, padding, dilation).output_size(image.shape[0], size, shape[2:])
    y = image.new_empty((image.shape[0], *places, shape[0]) if keep else (0,), dtype=torch.float32)
    result = image.new_empty(0)
    if out_format:
        out = ImageFormat(out_format, tuple(out_border))
        result = image.new_empty(out.shape(image.shape[0], shape[0], places), dtype=out.dtype)
    return y.permute(0, -1, *range(1, y.ndim - 1)) if keep else y, result


_LIBRARY.define("conv_image" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("conv_image", _conv, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::conv_image", _conv_shape, lib=_LIBRARY)
_operator = torch.ops.dybit.conv_image


def conv_image(
    image: Tensor,
    addend: Tensor | None,
    weight: QuantizedTensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    rounding: InputRounding,
    border: Sequence[int],
    out: InputRounding | None = None,
    out_border: Sequence[int] = (),
    limits: tuple[float, float] = (-_INFINITY, _INFINITY),
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Calls the operator. Arguments, results and errors: see :class:`PreparedConv` and its ``run``."""
    parts = (weight.packed, weight.scale, weight.choice, weight.tensor_scale)
    scales = (rounding.scale, rounding.offset, out and out.scale, out and out.offset)
    laid = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups, rounding.format, border)
    wanted = (*limits, keep, out.format if out else "", out_border)
    return cast(
        "tuple[Tensor, Tensor]", _operator(image, addend, *parts, bias, *scales, weight.spec.key, *laid, *wanted)
    )
