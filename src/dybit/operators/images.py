"""Images of significands: activations that stay integers from one convolution to the next.

An image is channels-last, of shape (batch, *size with the border, pitch). Places of the border hold the code of 0, for
the padding of the next convolution. A value takes one byte, or two if significands are wide.
``torch.ops.dybit.round_image`` makes an image from floating-point activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels.arguments import address, kernels_for
from dybit.kernels.code_operators import fake_quantize
from dybit.operators.input_rounding import InputFormat, InputRounding, input_format, max_significand

# format, border: see ImageFormat
SCHEMA = "(Tensor x, Tensor scale, Tensor? offset, str format, int[] border) -> Tensor"
_KINDS = {torch.int8: 1, torch.uint8: 2, torch.int16: 3}  # InputKind in csrc/kernels.h
_DENSE = 16  # with so many channels or more, the channels of a pixel are padded to a multiple of 32 for the products
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")

Rounded = tuple[int, int, bool, float, float]  # magnitude bits, longest run, signed, scale, offset: arguments of csrc


class UnknownError(DyBitError):
    """A value to be rounded is NaN, or an operand has a shape that images cannot take."""


@dataclass(frozen=True)
class ImageFormat:
    """How an image is rounded and laid out.

    Args:
        name: Of a single format that the kernels know (:func:`dybit.operators.input_rounding.input_format`).
        border: Zeros before and after every dimension in turn.
    """

    name: str
    border: tuple[int, ...]

    @cached_property
    def inputs(self) -> InputFormat:
        """The format in the kernels.

        Raises:
            DyBitError: The kernels do not know it.
        """
        inputs = input_format(self.name) if self.name else None
        if inputs is None:
            raise DyBitError(f"format must be one that the kernels round to, not {self.name!r}")
        return inputs

    @cached_property
    def dtype(self) -> torch.dtype:
        """uint8, int8 or int16: the first that holds every significand."""
        if max_significand(self.inputs) <= (127 if self.inputs.signed else 255):
            return torch.int8 if self.inputs.signed else torch.uint8
        return torch.int16

    @cached_property
    def layout(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Arguments of the extension: the number of the type, and the zeros before and after in three dimensions."""
        zeros = (0,) * (3 - len(self.border) // 2)
        return _KINDS[self.dtype], (*zeros, *self.border[::2]), (*zeros, *self.border[1::2])

    def shape(self, batch: int, channels: int, size: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of an image of a given size."""
        pitch = channels if channels < _DENSE else (channels + 31) // 32 * 32
        padded = (n + self.border[2 * i] + self.border[2 * i + 1] for i, n in enumerate(size))
        return (batch, *padded, pitch)

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the size of an image of a given shape, without its border."""
        return tuple(n - self.border[2 * i] - self.border[2 * i + 1] for i, n in enumerate(shape[1:-1]))

    def rounded(self, rounding: InputRounding) -> Rounded:
        """Returns the extension's arguments for rounding to such an image.

        Raises:
            DyBitError: ``rounding`` has no static scale, or has no code for the zeros of a border.
        """
        if rounding.scale is None:
            raise DyBitError("rounding must have a static scale for an image")
        if any(self.border) and not rounding.keeps_zero():
            raise DyBitError(f"border must be zero if the offset leaves 0 without a code, not {self.border}")
        shift = 0.0 if rounding.offset is None else rounding.offset.item()
        inputs = self.inputs
        scale = rounding.scale.item() * inputs.factor
        return inputs.magnitude_bits, inputs.max_run, inputs.signed, scale, shift

    @property
    def unit(self) -> float:
        """The significand of the value 1 at scale 1."""
        return float(2 ** (self.inputs.magnitude_bits - 1)) / self.inputs.factor


@lru_cache(maxsize=1024)
def image_format(name: str, border: tuple[int, ...]) -> ImageFormat:
    """Returns the cached :class:`ImageFormat` of a name and a border."""
    return ImageFormat(name, border)


def three(size: Sequence[int]) -> tuple[int, ...]:
    """Returns a size in three dimensions."""
    return (1,) * (3 - len(size)) + tuple(size)


def channels_last(x: Tensor) -> Tensor:
    """Returns floating-point activations (batch, channels, *size) channels-last, contiguous float32."""
    return x.detach().permute(0, *range(2, x.ndim), 1).float().contiguous()


def encode_image(x: Tensor, made: ImageFormat, rounding: InputRounding) -> Tensor:
    """Rounds activations to an image in plain torch.

    Raises:
        UnknownError: ``x`` holds NaN.
    """
    if bool(x.isnan().any()):
        raise UnknownError("x must not hold NaN where it is rounded to an image")
    image = (
        _significands(x.new_zeros(()), made, rounding).expand(made.shape(x.shape[0], x.shape[1], x.shape[2:])).clone()
    )
    inner = _inner(image, made)
    inner[..., x.shape[1] :] = 0
    inner[..., : x.shape[1]] = _significands(x, made, rounding).permute(0, *range(2, x.ndim), 1)
    return image


def _significands(x: Tensor, made: ImageFormat, rounding: InputRounding) -> Tensor:
    shifted = x.float() if rounding.offset is None else x.float() - rounding.offset
    values = cast(Tensor, fake_quantize(shifted, rounding.scale, None, made.name)) / cast(Tensor, rounding.scale)
    return (values * made.unit).round().to(made.dtype)


def decode_image(image: Tensor, channels: int, made: ImageFormat, rounding: InputRounding) -> Tensor:
    """Returns the values of an image in plain torch: float32 of shape (batch, channels, *size)."""
    values = _inner(image, made)[..., :channels].float() / made.unit * cast(Tensor, rounding.scale)
    values = values if rounding.offset is None else values + rounding.offset
    return values.permute(0, -1, *range(1, image.ndim - 1))


def _inner(image: Tensor, made: ImageFormat) -> Tensor:
    """An image without its border."""
    for i, n in enumerate(made.size(image.shape)):
        image = image.narrow(1 + i, made.border[2 * i], n)
    return image


def _round(x: Tensor, scale: Tensor, offset: Tensor | None, format: str, border: Sequence[int]) -> Tensor:
    made, rounding = image_format(format, tuple(border)), InputRounding(format, scale, offset)
    if not x.is_floating_point() or x.ndim != 2 + len(border) // 2:
        raise DyBitError(f"x must be floating point of {2 + len(border) // 2} dimensions, not {x.dtype} of {x.ndim}")
    compiled = kernels_for(x, scale)
    if compiled is None:
        return encode_image(x, made, rounding)
    batch, channels, *size = x.shape
    shape = made.shape(batch, channels, size)
    image = torch.empty(shape, dtype=made.dtype, device="cpu")
    given = channels_last(x)
    if given.numel() == 0:
        return encode_image(x, made, rounding)  # the border of an empty sample
    done = compiled.round_to_image(
        address("x", given, torch.float32, (batch, *size, channels)),
        batch,
        three(size),
        made.rounded(rounding),
        (address("image", image, made.dtype, shape), *made.layout, channels, shape[-1]),
        torch.get_num_threads(),
    )
    if not done:
        raise UnknownError("x must not hold NaN where it is rounded to an image")
    return image


def _round_shape(x: Tensor, scale: Tensor, offset: Tensor | None, format: str, border: Sequence[int]) -> Tensor:
    made = ImageFormat(format, tuple(border))
    return x.new_empty(made.shape(x.shape[0], x.shape[1], x.shape[2:]), dtype=made.dtype)


_LIBRARY.define("round_image" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("round_image", _round, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::round_image", _round_shape, lib=_LIBRARY)
_operator = torch.ops.dybit.round_image


def round_image(x: Tensor, rounding: InputRounding, border: Sequence[int]) -> Tensor:
    """Rounds activations to an image.

    Args:
        x: Floating point of shape (batch, channels, *size).
        rounding: The format, the static scale, and the offset, which gives 0 a code if the image has a border.
        border: Zeros before and after every dimension in turn.

    Returns:
        The image, of the type and shape of its :class:`ImageFormat`.

    Raises:
        UnknownError: ``x`` holds NaN, which has no significand.
        DyBitError: ``x`` is not floating point, or of other dimensions than the border.
    """
    return cast(Tensor, _operator(x, rounding.scale, rounding.offset, rounding.format, border))
