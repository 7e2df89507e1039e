"""Operators on images of significands: activations that stay integers from one convolution to the next.

An image is channels-last with a border of zeros, of shape (batch, *size and border,
pitch): what the next convolution reads, in one byte a value (two where significands are wide).
``torch.ops.dybit.round_image`` makes one of floating-point activations; ``torch.ops.dybit.conv_image`` convolves one,
adds, clamps, and returns floating point, the next image, or both. Codes are those that ``conv`` would
have made of the same values, and sums are its sums, so that a chain of images gives the bits of the layers one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels import extension
from dybit.kernels.arguments import address
from dybit.kernels.code_operators import fake_quantize
from dybit.operators import packed_weight
from dybit.operators.conv import Packed, convolve, extents, output_size, pack_conv
from dybit.operators.linear import Cache, read_spec
from dybit.tensors.quantized_tensor import QuantizedTensor

# format and border of an image as :class:`ImageFormat` has them; padding as for dybit::conv, at most the border.
ROUND_SCHEMA = "(Tensor x, Tensor scale, Tensor? offset, str format, int[] border) -> Tensor"
CONV_SCHEMA = (
    "(Tensor image, Tensor? addend, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, "
    "Tensor? bias, Tensor scale, Tensor? offset, Tensor? out_scale, Tensor? out_offset, str spec, int[] stride, "
    "int[] padding, int[] dilation, int groups, "
    "str format, int[] border, float low, float high, bool keep, str out_format, int[] out_border) -> (Tensor, Tensor)"
)
_KINDS = {torch.int8: 1, torch.uint8: 2, torch.int16: 3}  # InputKind in csrc/kernels.h
_F32 = torch.float32
_DENSE = 16  # channels: from here on every place starts at a multiple of 32, as products want it
_NOTHING = (0, 1, (0, 0, 0), (0, 0, 0), 0, 0)
_INFINITY = float("inf")
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")
_cache = Cache()


class UnknownError(DyBitError):
    """A value to be rounded is NaN, or an operand has a shape that images cannot take."""


@dataclass(frozen=True)
class ImageFormat:
    """How an image is rounded and laid out.

    Args:
        name: Of a single format that the kernels know (:func:`dybit.operators.packed_weight.input_format`).
        border: Zeros before and after every dimension in turn.
    """

    name: str
    border: tuple[int, ...]

    @property
    def inputs(self) -> packed_weight.InputFormat:
        """The format as the kernels know it."""
        return _inputs(self.name)

    @property
    def dtype(self) -> torch.dtype:
        """uint8, int8 or int16, whichever holds every significand."""
        largest = packed_weight.max_significand(self.inputs)
        if largest <= (127 if self.inputs.signed else 255):
            return torch.int8 if self.inputs.signed else torch.uint8
        return torch.int16

    def shape(self, batch: int, channels: int, size: Sequence[int]) -> tuple[int, ...]:
        """The shape of an image of some size."""
        pitch = channels if channels < _DENSE else (channels + 31) // 32 * 32
        padded = (n + self.border[2 * i] + self.border[2 * i + 1] for i, n in enumerate(size))
        return (batch, *padded, pitch)

    def size(self, image: Tensor) -> tuple[int, ...]:
        """The size of an image without its border."""
        return tuple(n - self.border[2 * i] - self.border[2 * i + 1] for i, n in enumerate(image.shape[1:-1]))


@lru_cache(maxsize=256)
def _inputs(name: str) -> packed_weight.InputFormat:
    inputs = packed_weight.input_format(name) if name else None
    if inputs is None:
        raise DyBitError(f"format must be one that the kernels round to, not {name!r}")
    return inputs


@lru_cache(maxsize=1024)
def _format(name: str, border: tuple[int, ...]) -> tuple[ImageFormat, Any, torch.dtype]:
    """A format with what is asked of it at every call: borders in three dimensions, and the type."""
    made = ImageFormat(name, border)
    zeros = (0,) * (3 - len(border) // 2)
    return made, ((*zeros, *border[::2]), (*zeros, *border[1::2])), made.dtype


def _three(size: Sequence[int]) -> tuple[int, ...]:
    return (1,) * (3 - len(size)) + tuple(size)


def _rounded(made: ImageFormat, scale: Tensor, offset: Tensor | None) -> tuple[int, int, bool, float, float]:
    inputs = made.inputs
    if offset is not None and any(made.border):
        raise DyBitError(f"border must be zero where there is an offset, not {made.border}")
    shift = 0.0 if offset is None else offset.item()
    return inputs.magnitude_bits, inputs.max_run, inputs.signed, scale.item() * inputs.factor, shift


def _last(x: Tensor) -> Tensor:
    """Floating-point activations channels-last, contiguous float32."""
    return x.detach().permute(0, *range(2, x.ndim), 1).float().contiguous()


def _round(x: Tensor, scale: Tensor, offset: Tensor | None, format: str, border: Sequence[int]) -> Tensor:
    made, borders, dtype = _format(format, tuple(border))
    if not x.is_floating_point() or x.ndim != 2 + len(border) // 2:
        raise DyBitError(f"x must be floating point of {2 + len(border) // 2} dimensions, not {x.dtype} of {x.ndim}")
    size = x.shape[2:]
    compiled = extension.load() if x.device.type == "cpu" and scale.device.type == "cpu" else None
    if compiled is None:
        return _encode(x, scale, offset, made)
    batch, channels = x.shape[:2]
    shape = made.shape(batch, channels, size)
    image = torch.empty(shape, dtype=dtype, device="cpu")
    given = _last(x)
    if given.numel() == 0:
        return image.zero_()  # the border of an empty sample
    if not compiled.round_to_image(
        address("x", given, _F32, (batch, *size, channels)), batch, _three(size), _rounded(made, scale, offset),
        (address("image", image, dtype, shape), _KINDS[dtype], *borders, channels, shape[-1]), torch.get_num_threads(),
    ):  # fmt: skip
        raise UnknownError("x must not hold NaN where it is rounded to an image")
    return image


def _unit(made: ImageFormat) -> float:
    """Significands in a value of 1 at scale 1."""
    return float(2 ** (made.inputs.magnitude_bits - 1)) / made.inputs.factor


def _encode(x: Tensor, scale: Tensor, offset: Tensor | None, made: ImageFormat) -> Tensor:
    """An image in plain torch."""
    if bool(x.isnan().any()):
        raise UnknownError("x must not hold NaN where it is rounded to an image")
    shifted = x.float() if offset is None else x.float() - offset
    values = cast(Tensor, fake_quantize(shifted, scale, None, made.name)) / scale
    image = torch.zeros(made.shape(x.shape[0], x.shape[1], x.shape[2:]), dtype=made.dtype, device=x.device)
    inner = _inner(image, made)[..., : x.shape[1]]
    inner.copy_((values * _unit(made)).round().to(made.dtype).permute(0, *range(2, x.ndim), 1))
    return image


def _inner(image: Tensor, made: ImageFormat) -> Tensor:
    """An image without its border."""
    for i, n in enumerate(made.size(image)):
        image = image.narrow(1 + i, made.border[2 * i], n)
    return image


def _decode(image: Tensor, channels: int, scale: Tensor, offset: Tensor | None, made: ImageFormat) -> Tensor:
    """The values of an image: float32 of shape (batch, channels, *size)."""
    values = _inner(image, made)[..., :channels].float() / _unit(made) * scale
    values = values if offset is None else values + offset
    return values.permute(0, -1, *range(1, image.ndim - 1))


class Prepared:
    """A convolution of images of one shape, with what can be found out before there is one.

    Args:
        shape: Of the image.
        weight: Of shape (out_channels, channels / groups, *kernel).
        bias: Of shape (out_channels,), or None.
        scale: The static scale of the image, float32 of shape (1,).
        offset: Its static offset, float32 of shape (1,), or None; only without a border.
        out_scale: The scale of the next image, or None.
        out_offset: Its offset, or None.
        stride: Of every dimension.
        padding: Zeros before and after every dimension in turn, at most the image's border.
        dilation: Of every dimension.
        groups: Groups of channels.
        format: The image's format (:class:`ImageFormat`).
        border: Likewise.
        low: Results below become this.
        high: Results above become this.
        keep: Whether the results are wanted in floating point.
        out_format: The next image's format, or empty for none.
        out_border: Likewise.
    """

    def __init__(
        self,
        shape: torch.Size,
        weight: QuantizedTensor,
        bias: Tensor | None,
        scale: Tensor,
        offset: Tensor | None,
        out_scale: Tensor | None,
        out_offset: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        format: str,
        border: Sequence[int],
        low: float = -_INFINITY,
        high: float = _INFINITY,
        keep: bool = True,
        out_format: str = "",
        out_border: Sequence[int] = (),
    ) -> None:
        self.shape, self.isa = shape, extension.isa()
        self._parts = (weight, bias, scale, offset, out_scale, out_offset)
        self._made, borders, self._dtype = _format(format, tuple(border))
        if len(shape) != len(weight.spec.shape):
            raise DyBitError(f"image must have {len(weight.spec.shape)} dimensions, not shape {tuple(shape)}")
        if any(a > b for a, b in zip(padding, border, strict=True)):
            raise DyBitError(f"padding must be at most the border {tuple(border)}, not {tuple(padding)}")
        self._geometry = (tuple(stride), tuple(padding), tuple(dilation))
        self._groups, self._limits, self._keep = groups, (low, high), keep
        size = tuple(n - border[2 * i] - border[2 * i + 1] for i, n in enumerate(shape[1:-1]))
        places = output_size((shape[0], 0, *size), weight.spec.shape, *self._geometry)
        batch, outputs, channels = shape[0], weight.spec.shape[0], weight.spec.shape[1] * groups
        if tuple(shape) != self._made.shape(batch, channels, size):
            raise DyBitError(f"image must be of {channels} channels, but has shape {tuple(shape)}")
        self._results = (batch, outputs, *places)
        self._last = (batch, *places, outputs)
        self._y = self._last if keep else (0,)
        self._to_first = (0, len(places) + 1, *range(1, len(places) + 1))
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self._out: ImageFormat | None = None
        self._image: tuple[int, ...] = (0,)
        self._target, self._rounded, out_dtype = _NOTHING[1:], (1, 1, True, 1.0, 0.0), self._dtype
        if out_format:
            assert out_scale is not None
            self._out, out_borders, out_dtype = _format(out_format, tuple(out_border))
            self._image = self._out.shape(batch, outputs, places)
            self._target = (_KINDS[out_dtype], *out_borders, outputs, self._image[-1])
            self._rounded = _rounded(self._out, out_scale, out_offset)
        self._image_dtype = out_dtype
        self._packed: Any = None
        if weight.packed.device.type == "cpu":
            key = (format, *self._geometry, groups, offset is not None)
            packed: Packed | None = _cache.get(
                weight,
                key,
                lambda: pack_conv(
                    weight, extents(weight, *self._geometry), groups, self._made.inputs, offset is not None
                ),
            )
            self._packed = packed
        self._source = (_KINDS[self._dtype], *borders, channels, shape[-1])
        self._call = (
            batch, _three(size), scale.item() * self._made.inputs.factor, address("offset", offset, _F32, (1,)),
            address("bias", self._bias, _F32, (outputs,)),
        ) if self._packed is not None else ()  # fmt: skip

    def run(self, image: Tensor, addend: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolves an image, adds, clamps, and rounds.

        Args:
            image: Significands of the shape.
            addend: Floating point that broadcasts to the results, or None.

        Returns:
            The results, float32 of shape (batch, out_channels, *size) laid out channels-last, and the next image; an
            empty tensor in the place of what is not wanted.

        Raises:
            UnknownError: A result that is to be rounded is NaN, or ``addend`` has a larger shape than the results.
            DyBitError: ``image`` is none of the format.
        """
        if image.dtype != self._dtype or image.shape != self.shape or not image.is_contiguous():
            raise DyBitError(
                f"image must be contiguous {self._dtype} of shape {tuple(self.shape)}, "
                f"not {image.dtype} of shape {tuple(image.shape)}"
            )
        if addend is not None:
            addend = _spread(addend, self._results)
        if self._packed is None or image.device.type != "cpu" or image.numel() == 0:
            return self._by_torch(image, addend)
        last = None if addend is None else _last(addend)
        y = torch.empty(self._y, dtype=_F32, device="cpu")
        result = torch.empty(self._image, dtype=self._image_dtype, device="cpu")
        done = self._packed.compiled.run_image(
            (address("image", image, self._dtype, self.shape), *self._source),
            *self._call,
            address("y", y, _F32, self._y) if self._keep else 0,
            address("addend", last, _F32, self._last),
            *self._limits,
            (address("result", result, self._image_dtype, self._image) if self._out else 0, *self._target),
            self._rounded,
            torch.get_num_threads(),
        )
        if not done:
            return self._by_torch(image, addend)
        return y.permute(self._to_first) if self._keep else y, result

    def _by_torch(self, image: Tensor, addend: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same in plain torch: the same codes, their products summed in floating point."""
        weight, bias, scale, offset, out_scale, out_offset = self._parts
        x = _decode(image, weight.spec.shape[1] * self._groups, scale, offset, self._made)
        bias = None if bias is None else bias.float()
        y = convolve(x, weight.dequantize(torch.float32), bias, *self._geometry, self._groups)
        if addend is not None:
            y = y + addend.float()
        y = y.clamp(*self._limits)
        result = torch.empty(self._image, dtype=self._image_dtype, device=image.device)
        if self._out is not None:
            assert out_scale is not None
            result = _encode(y, out_scale, out_offset, self._out)
        if not self._keep:
            return y.new_empty(0), result
        return y.permute(0, *range(2, y.ndim), 1).contiguous().permute(self._to_first), result


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
    *rest: Any,  # noqa: ANN401  # as the schema
) -> tuple[Tensor, Tensor]:
    stored = QuantizedTensor(read_spec(spec), weight, weight_scale, weight_choice, tensor_scale)
    return Prepared(image.shape, stored, bias, scale, offset, out_scale, out_offset, *rest).run(image, addend)


def _spread(addend: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(addend.shape) == shape:
        return addend
    try:
        return addend.expand(shape)
    except RuntimeError:
        raise UnknownError(f"addend must broadcast to {shape}, not have shape {tuple(addend.shape)}") from None


def _round_shape(x: Tensor, scale: Tensor, offset: Tensor | None, format: str, border: Sequence[int]) -> Tensor:
    made = ImageFormat(format, tuple(border))
    return x.new_empty(made.shape(x.shape[0], x.shape[1], x.shape[2:]), dtype=made.dtype)


def _conv_shape(image: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401  # as the operator
    spec, stride, padding, dilation, _, name, border, _, _, keep, out_format, out_border = rest[10:]
    shape = read_spec(spec).shape
    size = ImageFormat(name, tuple(border)).size(image)
    places = output_size((image.shape[0], 0, *size), shape, stride, padding, dilation)
    y = image.new_empty((image.shape[0], *places, shape[0]) if keep else (0,), dtype=torch.float32)
    result = image.new_empty(0)
    if out_format:
        out = ImageFormat(out_format, tuple(out_border))
        result = image.new_empty(out.shape(image.shape[0], shape[0], places), dtype=out.dtype)
    return y.permute(0, -1, *range(1, y.ndim - 1)) if keep else y, result


_LIBRARY.define("round_image" + ROUND_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("round_image", _round, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::round_image", _round_shape, lib=_LIBRARY)
_LIBRARY.define("conv_image" + CONV_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("conv_image", _conv, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::conv_image", _conv_shape, lib=_LIBRARY)
_round_operator = torch.ops.dybit.round_image
_conv_operator = torch.ops.dybit.conv_image


def round_image(x: Tensor, scale: Tensor, offset: Tensor | None, made: ImageFormat) -> Tensor:
    """Rounds activations to an image.

    Args:
        x: Floating point of shape (batch, channels, *size).
        scale: The static scale, float32 of shape (1,).
        offset: The static offset, likewise, or None; only without a border.
        made: The format.

    Returns:
        The image, of type ``made.dtype`` and shape ``made.shape(…)``.

    Raises:
        UnknownError: ``x`` holds NaN, which has no significand.
        DyBitError: ``x`` is not floating point, or of other dimensions than the border.
    """
    return cast(Tensor, _round_operator(x, scale, offset, made.name, made.border))


def conv_image(
    image: Tensor,
    addend: Tensor | None,
    weight: QuantizedTensor,
    bias: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    out_scale: Tensor | None,
    out_offset: Tensor | None,
    *options: Any,  # noqa: ANN401  # those of Prepared, in order
) -> tuple[Tensor, Tensor]:
    """The operator; arguments, result and errors as :class:`Prepared`, which callers that nobody watches may keep."""
    parts = (weight.packed, weight.scale, weight.choice, weight.tensor_scale)
    return cast(
        "tuple[Tensor, Tensor]",
        _conv_operator(image, addend, *parts, bias, scale, offset, out_scale, out_offset, weight.spec.key, *options),
    )
