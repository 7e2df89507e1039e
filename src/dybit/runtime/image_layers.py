"""Layers of a fused model: convolutions of images of significands, and rounding to an image."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dybit.layers.quantized import Quantized
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.dispatch import unwatched
from dybit.operators.images import ImageFormat, UnknownError, round_image
from dybit.operators.input_rounding import InputRounding
from dybit.operators.integer_conv import PreparedConv, conv_image
from dybit.operators.packed_cache import Snapshot
from dybit.runtime.memory_format import format_like

_WEIGHT = ("weight", "weight_scale", "weight_choice", "weight_tensor_scale", "input_scale", "input_offset")


class FusedConv(nn.Module):
    """A quantized convolution of an image, with the addition, clamping and rounding after it.

    Args:
        layer: The quantized convolution.
        source: The format of its image.
        padding: Zeros before and after every dimension in turn, including padding layers of the model.
        limits: The lowest and the highest result; others are clamped.
        keep: Whether to return the results in floating point.
        out: The format of the next image, or None.
        out_scale: Its scale.
        out_offset: Its offset, or None.
    """

    out_scale: Tensor | None
    out_offset: Tensor | None

    def __init__(
        self,
        layer: Quantized,
        source: ImageFormat,
        padding: tuple[int, ...],
        limits: tuple[float, float],
        keep: bool,
        out: ImageFormat | None,
        out_scale: Tensor | None,
        out_offset: Tensor | None,
    ) -> None:
        super().__init__()
        self.layer, self.source, self.out = layer, source, out
        self.register_buffer("out_scale", out_scale, persistent=False)
        self.register_buffer("out_offset", out_offset, persistent=False)
        self._prepared: tuple[PreparedConv, Snapshot] | None = None
        conv = cast(nn.Conv2d, layer)
        self._geometry = ConvGeometry.of(conv.stride, padding, conv.dilation, conv.groups)
        self._limits, self._keep = limits, keep

    def forward(self, image: Tensor, addend: Tensor | None = None, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolves an image. Returns the results and the next image; one may be empty (see ``PreparedConv``).

        Args:
            image: Significands in the format ``source``.
            addend: Float32 that broadcasts to the results, or None.
            like: The input of the model's convolutions, which determines the memory format of the results; None for
                channels-last.

        Raises:
            UnknownError: ``addend`` is not float32, or does not broadcast to the results, or a result is NaN.
        """
        if addend is not None and addend.dtype != torch.float32:
            raise UnknownError(f"addend must be float32, not {addend.dtype}")
        y, result = self._convolve(image, addend)
        return (y if like is None else format_like(y, like)), result

    def _convolve(self, image: Tensor, addend: Tensor | None) -> tuple[Tensor, Tensor]:
        state, bias = self.layer._buffers, self.layer.own_bias
        if not unwatched(image, bias):
            return conv_image(image, addend, *self._arguments(bias))
        parts = {**state, **self._buffers, "bias": bias}
        prepared = self._prepared
        if prepared is None or image.shape != prepared[0].shape or not prepared[1].holds(parts):
            given = {name: parts.get(name) for name in (*_WEIGHT, *self._buffers, "bias")}
            prepared = self._prepared = PreparedConv(image.shape, *self._arguments(bias)), Snapshot(given)
        return prepared[0].run(image, addend)

    def _arguments(self, bias: Tensor | None) -> tuple[Any, ...]:
        """Returns the arguments of the operator after the image and the addend."""
        out = None if self.out is None else InputRounding(self.out.name, self.out_scale, self.out_offset)
        return (
            self.layer.quantized_tensor(),
            bias,
            self._geometry,
            self.layer.input_rounding(),
            self.source.border,
            out,
            self.out.border if self.out else (),
            self._limits,
            self._keep,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Drops the prepared convolution: copies prepare their own."""
        return self.__dict__ | {"_prepared": None}

    def extra_repr(self) -> str:
        """The formats of the image and of the next one."""
        return f"source={self.source}, out={self.out}"


class Rounding(nn.Module):
    """Rounds activations to an image if no convolution before does.

    Args:
        scale: The static scale.
        offset: The static offset, or None.
        out: The format.
    """

    scale: Tensor
    offset: Tensor | None

    def __init__(self, scale: Tensor, offset: Tensor | None, out: ImageFormat) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        """Rounds activations of shape (batch, channels, *size).

        Raises:
            UnknownError: ``x`` is not float32, has another number of dimensions, or holds NaN.
        """
        if x.dtype != torch.float32 or x.ndim != 2 + len(self.out.border) // 2:
            raise UnknownError(
                f"x must be float32 of {2 + len(self.out.border) // 2} dimensions, not {x.dtype} of {x.ndim}"
            )
        return round_image(x, InputRounding(self.out.name, self.scale, self.offset), self.out.border)

    def extra_repr(self) -> str:
        """The format of the image."""
        return f"out={self.out}"
