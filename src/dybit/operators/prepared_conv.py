"""A convolution prepared for many calls: it is packed once, and each call only checks that nothing has changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dybit.operators.conv import conv, layout_of
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.dispatch import unwatched
from dybit.operators.input_rounding import InputRounding
from dybit.operators.packed_cache import LayerSnapshot
from dybit.operators.packed_conv import packed_conv_for
from dybit.tensors.quantized_tensor import QuantizedTensor

_F32 = torch.float32
_MOST_SIZES = 64  # of samples, whose results' sizes are kept


class PreparedLayer:
    """A weight packed for the inputs of one layer, with its bias and geometry.

    Args:
        weight: The weight.
        bias: Of shape (out_channels,), or None.
        geometry: Stride, padding, dilation and groups.
        rounding: How inputs are rounded.

    Attributes:
        snapshot: Of the tensors above.
    """

    __slots__ = ("_bias", "_channels", "_convolution", "_geometry", "_places", "_rounding", "_weight", "snapshot")

    def __init__(
        self, weight: QuantizedTensor, bias: Tensor | None, geometry: ConvGeometry, rounding: InputRounding
    ) -> None:
        self._weight, self._bias, self._geometry, self._rounding = weight, bias, geometry, rounding
        self.snapshot = LayerSnapshot(weight, bias, rounding)
        packed = packed_conv_for(weight, geometry, rounding)
        known = bias is None or (bias.dtype is _F32 and bias.is_cpu and bias.is_contiguous())
        self._convolution = packed.prepared(bias, rounding) if packed is not None and known else None
        self._channels = weight.spec.shape[1] * geometry.groups
        self._places: dict[tuple[int, ...], tuple[int, ...]] = {}

    def convolve(self, x: Tensor) -> Tensor:
        r"""Convolves as :func:`dybit.operators.conv.conv`.

        Args:
            x: Floating point of shape (batch, channels, \*size), or without the batch.

        Returns:
            Of shape (batch, out_channels, \*output size) and the type of ``x``.

        Raises:
            DyBitError: As for :func:`dybit.operators.conv.conv`.
        """
        made = self._convolution
        if made is not None and self._takes(x):
            layout = layout_of(x)
            places = self._size(x.shape)
            y = torch.empty(
                (x.shape[0], self._weight.spec.rows, *places), dtype=_F32, device="cpu", memory_format=layout
            )
            if layout is torch.contiguous_format:
                done = x.is_contiguous() and made.run(x.detach(), y, places, planar=True)
            else:
                last = (0, *range(2, x.ndim), 1)
                done = made.run(x.detach().permute(last), y.permute(last), places)
            if done:
                return y
        return conv(x, self._weight, self._bias, self._geometry, self._rounding)

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernels can convolve ``x`` as it is, and the dispatcher can be bypassed."""
        return (
            unwatched(x, self._bias)  # first: while tracing, sizes are tensors
            and x.dtype is _F32
            and x.is_cpu
            and x.ndim == len(self._weight.spec.shape)
            and x.shape[1] == self._channels
            and x.numel() > 0
        )

    def _size(self, shape: Sequence[int]) -> tuple[int, ...]:
        size = tuple(shape[2:])
        places = self._places.get(size)
        if places is None:
            if len(self._places) == _MOST_SIZES:
                self._places.clear()
            found = self._geometry.output_size(shape[0], size, self._weight.spec.shape[2:])
            places = self._places[size] = tuple(found)
        return places
