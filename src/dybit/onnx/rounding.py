"""Rounding of inputs as ONNX: to the values of any format by a table, or to integers by QuantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from dybit.formats import catalogue
from dybit.formats.codebook import Codebook
from dybit.kernels.lookup import grid, lookup
from dybit.kernels.rounding import largest_scale
from dybit.layers.kinds import channel_dim
from dybit.layers.quantized import Quantized
from dybit.onnx.graph import Builder
from dybit.onnx.weights import step

_TINIEST = 2.0**-126


def table_round(build: Builder, x: ir.Value, layer: Quantized, rank: int) -> ir.Value:
    """Rounds inputs as :meth:`dybit.layers.quantized.Quantized.round_input` does, in float32, NaN staying NaN.

    Args:
        build: Where the nodes go.
        x: float32 of a rank.
        layer: Whose inputs they are.
        rank: Of x.
    """
    spec = layer.input_spec
    assert spec is not None
    if spec.mode == "static":
        scale = build.constant(layer.get_buffer("input_scale").item())
        if not spec.offset:
            return _scaled_round(build, x, scale, spec.format)
        offset = build.constant(layer.get_buffer("input_offset").item())
        return build.op("Add", _scaled_round(build, build.op("Sub", x, offset), scale, spec.format), offset)
    first = channel_dim(layer, torch.empty([0] * rank, dtype=torch.float32, device="cpu"))
    if first != rank - 1:  # a convolution: a scale for every sample
        return _dynamic(build, x, list(range(first, rank)), spec.reach or 1.0, spec.format)
    columns = x.shape[-1] if x.shape is not None else None
    size = spec.group_size
    if size is None or not isinstance(columns, int) or size >= columns:
        return _dynamic(build, x, [-1], spec.reach or 1.0, spec.format)
    groups = -(-columns // size)
    if groups * size != columns:
        x = build.op("Pad", x, build.constant([0] * (2 * rank - 1) + [groups * size - columns], np.int64))
    split = build.reshape(x, [0] * (rank - 1) + [groups, size])
    whole = _dynamic(build, split, [-1], spec.reach or 1.0, spec.format)
    y = build.reshape(whole, [0] * (rank - 1) + [groups * size])
    return y if groups * size == columns else build.slice(y, rank - 1, columns)


def is_integer(layer: Quantized) -> bool:
    """Whether the inputs of a layer have static scales and are integers of at most 8 bits."""
    spec = layer.input_spec
    return spec is not None and spec.mode == "static" and _integer_range(_book(spec.format)) is not None


def integer_round(build: Builder, x: ir.Value, layer: Quantized) -> ir.Value:
    """Rounds static inputs by QuantizeLinear and DequantizeLinear, which runtimes fuse with what follows."""
    spec = layer.input_spec
    assert spec is not None
    found = _integer_range(_book(spec.format))
    assert found is not None
    unit, low, high = found
    kind = np.uint8 if low >= 0 else np.int8
    scale = layer.get_buffer("input_scale").item() * unit
    offset = build.constant(layer.get_buffer("input_offset").item()) if spec.offset else None
    if offset is not None:
        x = build.op("Sub", x, offset)
    if (low, high) != (0, 255):  # else the type saturates there itself
        x = build.op("Clip", x, build.constant(low * scale), build.constant(high * scale))
    factor, zero = build.constant(scale), build.constant(0, kind)
    y = build.op("DequantizeLinear", build.op("QuantizeLinear", x, factor, zero), factor, zero)
    return y if offset is None else build.op("Add", y, offset)


def _integer_range(book: Codebook) -> tuple[float, int, int] | None:
    """The step, and the least and largest integer, of a format of all integers between them; None for others."""
    unit = step(book)
    if not unit:
        return None
    levels = np.round(book.levels / unit).astype(int)
    low, high = int(levels[0]), int(levels[-1])
    whole = len(levels) == high - low + 1 and not book.tie_losers
    # QuantizeLinear takes ties to the even integer.
    even = whole and bool((book.ties_up == (levels[1:] % 2 == 0)).all())
    return (unit, low, high) if even and ((low >= 0 and high <= 255) or (low >= -128 and high <= 127)) else None


def _book(format: str) -> Codebook:
    return catalogue.family(format).books[0]


def _dynamic(build: Builder, x: ir.Value, axes: list[int], reach: float, format: str) -> ir.Value:
    largest = build.op("ReduceMax", build.op("Abs", x), build.constant(axes, np.int64), keepdims=1)
    bad = build.op("Or", build.op("IsNaN", largest), build.op("IsInf", largest))
    most = largest_scale(_book(format))
    scale = build.op("Clip", build.op("Div", largest, build.constant(reach)),
                     build.constant(_TINIEST), build.constant(most))  # fmt: skip
    return _scaled_round(build, x, build.op("Where", bad, build.constant(float("nan")), scale), format)


def _scaled_round(build: Builder, x: ir.Value, scale: ir.Value, format: str) -> ir.Value:
    ratio = build.op("Div", x, scale)
    unknown = build.op("IsNaN", ratio)
    known = build.op("Where", unknown, build.constant(0.0), ratio)
    value = build.op("Mul", _nearest(build, known, format), scale)
    return build.op("Where", unknown, ratio, value)


def _nearest(build: Builder, x: ir.Value, format: str) -> ir.Value:
    """The nearest value of a format, ties as everywhere.

    By a table over the cells of a grid, or by comparing with all thresholds where these lie on none.
    """
    book = _book(format)
    unit, limit = grid(book.midpoints)
    levels = build.constant(book.levels)
    if not unit:
        above = build.op("Greater", build.op("Unsqueeze", x, build.constant([-1], np.int64)),
                         build.constant(book.boundaries(np.float32)))  # fmt: skip
        index = build.op("ReduceSum", build.cast(above, ir.DataType.INT32), build.constant([-1], np.int64), keepdims=0)
        return build.op("Gather", levels, index)
    # Entry 2k is the point k·unit, entry 2k+1 the open interval above it, as in dybit.kernels.code_operators.Lookup.
    points = torch.arange(-2 * limit, 2 * limit + 1, dtype=torch.float32, device="cpu") * (unit / 2)
    cells = lookup(book, torch.device("cpu")).nearest(points).numpy().astype(np.uint8)
    table = build.op("Gather", levels, build.cast(build.initializer(f"dybit.{format}.cells", cells), ir.DataType.INT32))
    position = build.op("Clip", build.op("Mul", x, build.constant(1.0 / unit)),
                        build.constant(-limit), build.constant(limit))  # fmt: skip
    both = build.op("Add", build.op("Floor", position), build.op("Ceil", position))
    index = build.cast(build.op("Add", both, build.constant(2 * limit)), ir.DataType.INT32)
    return build.op("Gather", table, index)
