"""Convolutions in the layout of the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dybit.kernels import extension
from dybit.kernels.arguments import address
from dybit.kernels.packed_codes import pack
from dybit.operators import packed_weight
from dybit.operators.conv_geometry import ConvGeometry, Extents
from dybit.operators.input_rounding import InputFormat, InputRounding, input_format, max_significand
from dybit.operators.packed_cache import PackedCache
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

_F32 = torch.float32
_EXACT = 1 << 24  # FP32 holds every integer up to here
_BLOCK_ROWS = 16  # results that the kernels compute at once
_MOST_COLUMNS = 1024  # of merged groups: their sums still have one part
_LEAST_COLUMNS = 8  # per group: with fewer, torch is faster unless the kernels have a special case


class PackedConv:
    """A convolution in the layout of the kernels: one weight per group, or one table for depthwise convolutions.

    Args:
        compiled: The extension's own object.
        inputs: The format of the inputs.
        parts: The weights whose addresses the extension holds.
        channels: Channels of the inputs.
        rows: Channels of the results.
    """

    def __init__(
        self,
        compiled: Any,  # noqa: ANN401
        inputs: InputFormat,
        parts: list[packed_weight.PackedWeight],
        channels: int,
        rows: int,
    ) -> None:
        self.parts = parts
        self.compiled = compiled
        self._channels, self._rows, self._inputs = channels, rows, inputs

    def run(
        self,
        x: Tensor,
        y: Tensor,
        places: Sequence[int],
        bias: Tensor | None,
        rounding: InputRounding,
        planar: bool = False,
    ) -> bool:
        """Convolves images.

        Args:
            x: float32 of shape (batch, *size, channels), or (batch, channels, *size) if ``planar``, contiguous.
            y: Receives the results: float32 of shape (batch, *places, rows) or (batch, rows, *places), contiguous.
            places: The size of the results.
            bias: float32 of shape (rows,), or None.
            rounding: How inputs are rounded.
            planar: Whether channels precede the size in ``x`` and ``y``.

        Returns:
            False if ``x`` holds NaN, or infinity at a dynamic scale, which have no significand.

        Raises:
            DyBitError: A tensor has another type, shape, device or layout.
        """
        return self.prepared(bias, rounding).run(x, y, places, planar)

    def prepared(self, bias: Tensor | None, rounding: InputRounding) -> Convolution:
        """Returns the convolution with its bias and rounding, checked once.

        Raises:
            DyBitError: A tensor has another type, shape, device or layout.
        """
        return Convolution(self.compiled, self._inputs.factor, self._channels, self._rows, bias, rounding)


class Convolution:
    """A packed convolution with all other arguments of :meth:`PackedConv.run` but the images.

    Args:
        compiled: The extension's own object.
        factor: Of the format of the inputs.
        channels: Channels of the inputs.
        rows: Channels of the results.
        bias: As for :meth:`PackedConv.run`. Do not move its memory, or that of the scales, afterwards.
        rounding: As for :meth:`PackedConv.run`.

    Raises:
        DyBitError: A tensor has another type, shape, device or layout.
    """

    __slots__ = ("_channels", "_given", "_kept", "_rows", "_run")

    def __init__(
        self,
        compiled: Any,  # noqa: ANN401
        factor: float,
        channels: int,
        rows: int,
        bias: Tensor | None,
        rounding: InputRounding,
    ) -> None:
        scale = rounding.scale
        if scale is not None and factor != 1:
            scale = scale * factor
        self._kept = (compiled, bias, scale, rounding.offset)  # the extension holds their addresses
        self._run, self._channels, self._rows = compiled.run, channels, rows
        self._given = (
            address("bias", bias, _F32, (rows,)),
            address("input_scale", scale, _F32, (1,)),
            address("input_offset", rounding.offset, _F32, (1,)),
            rounding.reach / factor,
        )

    def run(self, x: Tensor, y: Tensor, places: Sequence[int], planar: bool = False) -> bool:
        """Convolves images: :meth:`PackedConv.run`."""
        batch, size = x.shape[0], x.shape[2:] if planar else x.shape[1:-1]
        given, found = (self._channels, *size), (self._rows, *places)
        if not planar:
            given, found = (*size, self._channels), (*places, self._rows)
        return bool(
            self._run(
                address("x", x, _F32, (batch, *given)),
                batch,
                (1,) * (3 - len(size)) + tuple(size),
                address("y", y, _F32, (batch, *found)),
                *self._given,
                planar,
                torch.get_num_threads(),
            )
        )


_cache = PackedCache[PackedConv]()


def packed_conv_for(weight: QuantizedTensor, geometry: ConvGeometry, rounding: InputRounding) -> PackedConv | None:
    """Returns a convolution in the layout of the kernels, packed at the first call.

    Returns None if the kernels do not support it, or if torch is faster.
    """
    keeps_zero = rounding.keeps_zero()
    key = (rounding.format, geometry, keeps_zero)
    return _cache.get(weight, key, lambda: _pack(weight, geometry, input_format(rounding.format), keeps_zero))


def _pack(
    weight: QuantizedTensor, geometry: ConvGeometry, inputs: InputFormat | None, keeps_zero: bool
) -> PackedConv | None:
    compiled, spec = extension.load(), weight.spec
    if compiled is None or inputs is None or not packed_weight.supports(spec.family) or spec.transposed:
        return None
    extents, groups = geometry.extents(spec.shape[2:]), geometry.groups
    if not keeps_zero and any(map(any, extents[3:])):  # zeros of the border have no code
        return None
    channels = spec.shape[1] * groups
    if spec.shape[1] == 1 and groups == spec.rows > 1:
        return _pack_depthwise(weight, extents, groups, inputs)
    weight, groups = _merged(weight, groups)
    spec = weight.spec
    if groups > 1 and spec.columns < _LEAST_COLUMNS:
        return None
    permuted = spec.groups == 1 and math.prod(spec.shape[2:]) > 1
    rows = spec.rows // groups
    parts = [
        packed_weight.PackedWeight(packed_weight.take_rows(weight, g * rows, rows, permuted), inputs)
        for g in range(groups)
    ]
    made = compiled.Conv([part.compiled for part in parts], extents, channels, groups, not permuted)
    return PackedConv(made, inputs, parts, channels, spec.rows)


def _merged(weight: QuantizedTensor, groups: int) -> tuple[QuantizedTensor, int]:
    """Merges small groups until their results fill a block of the kernels, with zeros for channels of other groups.

    The kernels then finish whole blocks. Returns the weight and the number of groups that are left; both as given if
    groups are large, scales belong to parts of rows, or a codebook that is used has no zero.
    """
    spec = weight.spec
    rows = spec.rows // groups
    most = min(_BLOCK_ROWS // rows, _MOST_COLUMNS // spec.columns)
    count = max((n for n in range(2, most + 1) if groups % n == 0), default=1)
    if count == 1 or spec.groups > 1:
        return weight, groups
    choice = weight.choices()
    books = (
        torch.zeros(spec.rows, dtype=torch.int64, device="cpu")
        if choice is None
        else choice.long().expand(spec.rows, 1)[:, 0]
    )
    zeros = torch.tensor(
        [next(iter(np.flatnonzero(book.values == 0)), -1) for book in spec.formats.books],
        dtype=torch.int64,
        device="cpu",
    )
    if zeros[books].min() < 0:
        return weight, groups
    codes = zeros[books].to(torch.uint8)
    whole = codes[:, None, None].repeat(1, count, spec.columns)
    place = torch.arange(spec.rows, dtype=torch.int64, device="cpu") // rows % count
    whole[torch.arange(spec.rows, dtype=torch.int64, device="cpu"), place] = weight.codes()
    shape = (spec.rows, count * spec.shape[1], *spec.shape[2:])
    part = TensorSpec(spec.family, shape, "channel", None, "fp32", "channel")
    own = None if choice is None else packed_weight.pack_choices(choice.expand(spec.rows, 1).contiguous(), part)
    packed = pack(whole.flatten(1), spec.bits).view(part.packed_shape)
    return QuantizedTensor(part, packed, weight.scales().expand(spec.rows, 1).contiguous(), own), groups // count


def _pack_depthwise(weight: QuantizedTensor, extents: Extents, groups: int, inputs: InputFormat) -> PackedConv | None:
    compiled, spec = extension.load(), weight.spec
    if spec.groups != 1 or compiled is None:
        return None
    significands, scales = packed_weight.significands(weight)
    largest = max_significand(inputs) * float(significands.abs().sum(1).max())
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
    return PackedConv(made, inputs, [], groups, groups)
