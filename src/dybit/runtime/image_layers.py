"""Layers of a fused model: convolutions of images of significands, and the rounding that makes an image."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from dybit.kernels import extension
from dybit.layers.quantized import Quantized
from dybit.operators.integer_conv import ImageFormat, Prepared, conv_image, round_image
from dybit.operators.linear import _unwatched

_WEIGHT = ("weight", "weight_scale", "weight_choice", "weight_tensor_scale")


def _versions(parts: tuple[Tensor | None, ...]) -> list[int]:
    return [0 if part is None or part.is_inference() else part._version for part in parts]


class FusedConv(nn.Module):
    """A quantized convolution of an image, with what follows it.

    Args:
        layer: The quantized convolution.
        source: The format of its image.
        padding: Zeros before and after every dimension in turn, those of the model's own padding included.
        limits: Between which results are clamped.
        keep: Whether results are wanted in floating point.
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
        self._prepared: tuple[Prepared, tuple[Tensor | None, ...], list[int]] | None = None
        conv = cast(nn.Conv2d, layer)
        self._options: tuple[Any, ...] = (
            (*conv.stride,), padding, (*conv.dilation,), conv.groups, source.name, source.border,
            *limits, keep, *((out.name, out.border) if out else ("", ())),
        )  # fmt: skip

    def forward(self, image: Tensor, addend: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolves an image: results and the next image, of which one may be empty (``Prepared``)."""
        buffers, bias = self.layer._buffers, self.layer.own_bias
        scales = (cast(Tensor, buffers["input_scale"]), buffers.get("input_offset"), self.out_scale, self.out_offset)
        if not _unwatched(image, bias):
            return conv_image(image, addend, self.layer.quantized_tensor(), bias, *scales, *self._options)
        parts = (*(buffers.get(name) for name in _WEIGHT), bias, *scales)
        if not self._fits(image, parts):
            made = Prepared(image.shape, self.layer.quantized_tensor(), bias, *scales, *self._options)
            self._prepared = (made, parts, _versions(parts))
        assert self._prepared is not None
        return self._prepared[0].run(image, addend)

    def _fits(self, image: Tensor, parts: tuple[Tensor | None, ...]) -> bool:
        """Whether what was prepared is for such an image and for the same tensors, not written to since."""
        if self._prepared is None:
            return False
        made, before, versions = self._prepared
        return (
            image.shape == made.shape
            and all(a is b for a, b in zip(parts, before, strict=True))
            and versions == _versions(parts)
            and made.isa == extension.isa()
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what was prepared: copies prepare their own."""
        return self.__dict__ | {"_prepared": None}

    def extra_repr(self) -> str:
        """What it takes and gives."""
        return f"source={self.source}, out={self.out}"


class Rounding(nn.Module):
    """Rounds activations to an image, where no convolution before does.

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
        """Rounds (batch, channels, *size)."""
        return round_image(x, self.scale, self.offset, self.out)

    def extra_repr(self) -> str:
        """What it gives."""
        return f"out={self.out}"
