"""Weights as ONNX: codes and a table, integers, or E2M1, each with its scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from dybit.formats.codebook import Codebook
from dybit.onnx.graph import Array, Builder, unsigned
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

MICROSOFT = "com.microsoft"
_NORMAL = 2.0**-126
_BLOCKS = (256, 128, 64, 32, 16)  # for which ONNX Runtime has kernels
_BLOCK = 32  # where a whole channel shares a scale: inputs are rounded by the block too


@dataclass(frozen=True)
class Integers:
    """A weight as integers times scales, with exactly its values.

    Attributes:
        values: int64 of shape (rows, columns).
        scale: float32 of shape (rows, groups).
        group_size: Columns in a group; all of them where ``scale`` has one column.
    """

    values: Array
    scale: Array
    group_size: int

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return int(np.abs(self.values).max())


def table_matrix(build: Builder, weight: QuantizedTensor, name: str) -> ir.Value:
    """A weight as codes, looked up in a table and scaled: float32 of shape (rows, columns)."""
    spec = weight.spec
    codes, choice, scale = _parts(build, weight, name)
    return flat(build, _looked_up(build, codes, choice, scale, spec, weight), spec)


def table_rows(build: Builder, weight: QuantizedTensor, name: str, index: ir.Value, rank: int) -> ir.Value:
    """Some rows of a weight: for ``index`` of a rank, float32 of shape (*index, columns)."""
    spec = weight.spec
    codes, choice, scale = _parts(build, weight, name)
    if spec.bits <= 4:  # no runtime gathers half bytes
        codes = build.cast(codes, ir.DataType.UINT8)
    codes = build.op("Gather", codes, index)
    if choice is not None and spec.unit_shape(spec.choice)[0] > 1:
        choice = build.op("Gather", choice, index)
    if spec.scale_shape[0] > 1:
        scale = build.op("Gather", scale, index)
    values = _looked_up(build, codes, choice, scale, spec, weight)
    if spec.groups > 1:
        values = build.reshape(values, [0] * rank + [spec.groups * (spec.group_size or 0)])
        values = build.slice(values, rank, spec.columns)
    return values


def from_matrix(build: Builder, matrix: ir.Value, spec: TensorSpec) -> ir.Value:
    """As :meth:`dybit.tensors.quantized_tensor.TensorSpec.from_matrix`."""
    if not spec.transposed:
        return matrix if len(spec.shape) == 2 else build.reshape(matrix, list(spec.shape))
    rest = [spec.shape[0] // spec.transposed, *spec.shape[2:]]
    split = build.reshape(matrix, [spec.transposed, spec.shape[1], *rest])
    order = [0, 2, 1, *range(3, len(rest) + 2)]
    return build.reshape(build.op("Transpose", split, perm=order), list(spec.shape))


def flat(build: Builder, grouped: ir.Value, spec: TensorSpec) -> ir.Value:
    """Groups side by side: (rows, groups, group size), the last padded, to (rows, columns)."""
    if spec.groups == 1:
        return grouped
    size = spec.group_size or spec.columns
    matrix = build.reshape(grouped, [spec.rows, spec.groups * size])
    return matrix if spec.columns == spec.groups * size else build.slice(matrix, 1, spec.columns)


def integers(weight: QuantizedTensor) -> Integers | None:
    """A weight as integers of at most 8 bits; None if its values are not integers (or too small for float32)."""
    spec = weight.spec
    used, choice = _used(weight)
    steps = [step(book) for book in used]
    if not all(steps):
        return None
    tables = np.stack([np.nan_to_num(book.values / unit) for book, unit in zip(used, steps, strict=True)])
    if np.abs(tables).max() > 127:
        return None
    units = np.array(steps)[choice]
    scale = np.broadcast_to(weight.scales().numpy().astype(np.float64) * units, (spec.rows, spec.groups))
    if (np.abs(scale) < _NORMAL).any():
        return None
    choices = _spread(choice, spec)
    values = tables[choices, weight.codes().numpy()].astype(np.int64)
    return Integers(values, scale.astype(np.float32), spec.group_size or spec.columns)


def step(book: Codebook) -> float:
    """The largest power of two, at least 2^-16, that divides all values; 0 if no power does."""
    values = book.levels
    for exponent in range(4, -17, -1):
        ratio = values / 2.0**exponent
        if np.array_equal(ratio, np.round(ratio)):
            return 2.0**exponent
    return 0.0


def integer_matrix(build: Builder, weight: Integers, name: str) -> ir.Value:
    """A weight with one scale a channel, as int8 dequantized: float32 of shape (columns, rows), to multiply by."""
    values = build.initializer(f"{name}.int8_t", weight.values.T.astype(np.int8))
    scale = build.initializer(f"{name}.scale", weight.scale[:, 0])
    return build.op("DequantizeLinear", values, scale, build.constant(np.zeros(weight.scale.shape[0]), np.int8), axis=1)


def integer_kernel(build: Builder, weight: Integers, spec: TensorSpec, name: str) -> ir.Value:
    """The weight of a convolution with one scale a channel, as int8 dequantized: float32 of ``spec.shape``."""
    values = build.initializer(f"{name}.int8", weight.values.astype(np.int8).reshape(spec.shape))
    scale = build.initializer(f"{name}.scale", weight.scale[:, 0])
    return build.op("DequantizeLinear", values, scale, build.constant(np.zeros(spec.rows), np.int8), axis=0)


def integer_product(build: Builder, x: ir.Value, weight: Integers, name: str) -> ir.Value | None:
    """``x · weightᵀ`` by ONNX Runtime's MatMulNBits, which rounds x to 8 bits; None where no block size fits."""
    rows, columns = weight.values.shape
    fitting = [size for size in _BLOCKS if weight.group_size % size == 0]
    block = _BLOCK if weight.scale.shape[1] == 1 else fitting[0] if fitting else 0
    if not block:
        return None
    bits = 4 if weight.values.min() >= -8 and weight.values.max() <= 7 else 8
    zero = 1 << (bits - 1)  # what the operator takes for the zero point without being told
    count = -(-columns // block)
    padded = np.full((rows, count * block), zero, dtype=np.uint8)
    padded[:, :columns] = weight.values + zero
    blocks = padded.reshape(rows, count, block)
    if bits == 4:
        blocks = blocks[..., ::2] | blocks[..., 1::2] << 4
    unit = np.arange(count) * block // weight.group_size
    return build.op(
        "MatMulNBits", x, build.initializer(f"{name}.{bits}bit", blocks),
        build.initializer(f"{name}.block_scale", weight.scale[:, unit].reshape(-1)),
        domain=MICROSOFT, K=columns, N=rows, bits=bits, block_size=block, accuracy_level=4,
    )  # fmt: skip


def is_e2m1(weight: QuantizedTensor) -> bool:
    """Whether the values of a weight are those of FP4 E2M1 at some scale."""
    used, _ = _used(weight)
    return all(_e2m1_unit(book) for book in used)


def e2m1_matrix(build: Builder, weight: QuantizedTensor, name: str) -> ir.Value:
    """A weight of E2M1 values as FLOAT4E2M1, dequantized by channel or group: float32 of shape (rows, columns)."""
    spec = weight.spec
    used, choice = _used(weight)
    units = np.array([_e2m1_unit(book) for book in used])
    scale = weight.scales().numpy() * units[choice].astype(np.float32)
    values = np.stack([book.values / unit for book, unit in zip(used, units, strict=True)])
    matrix = values[_spread(choice, spec), weight.codes().numpy()].astype(ml_dtypes.float4_e2m1fn)
    stored = build.initializer(f"{name}.e2m1", matrix)
    scale = np.broadcast_to(scale, (spec.rows, spec.groups))
    if spec.groups == 1:
        return build.op("DequantizeLinear", stored, build.initializer(f"{name}.scale", scale[:, 0]), axis=0)
    tensor = build.initializer(f"{name}.scale", scale)
    return build.op("DequantizeLinear", stored, tensor, axis=1, block_size=spec.group_size)


def _e2m1_unit(book: Codebook) -> float:
    """The value of E2M1's 1 in a codebook: 1 for ``e2m1``, 1/2 for ``s4r2``, 0 for others."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = np.concatenate([-magnitudes[:0:-1], magnitudes])
    unit = float(book.levels[-1] / 6)
    return unit if unit > 0 and np.array_equal(book.levels, levels * unit) else 0.0


def _used(weight: QuantizedTensor) -> tuple[list[Codebook], Array]:
    """The codebooks that a weight uses, and which of them every unit does: (1 or rows, 1 or groups)."""
    books, choices = weight.spec.formats.books, weight.choices()
    if choices is None:
        return list(books), np.zeros((1, 1), dtype=np.int64)
    used, index = np.unique(choices.numpy(), return_inverse=True)
    return [books[i] for i in used], index.reshape(tuple(choices.shape))


def _spread(units: Array, spec: TensorSpec) -> Array:
    """Units, (1 or rows, 1 or groups), for every element: (rows, columns)."""
    if units.shape[1] > 1:
        units = np.repeat(units, spec.group_size or spec.columns, axis=1)[:, : spec.columns]
    return np.broadcast_to(units, (spec.rows, spec.columns))


def _parts(build: Builder, weight: QuantizedTensor, name: str) -> tuple[ir.Value, ir.Value | None, ir.Value]:
    """Codes (rows, columns) or (rows, groups, group size), and choices and scales that broadcast against them."""
    spec = weight.spec
    codes = weight.codes().numpy()
    used, choice = _used(weight)

    def unit(table: Array) -> Array:
        return table[..., None] if spec.groups > 1 else table

    if spec.groups > 1:
        size = spec.group_size or spec.columns
        codes = np.pad(codes, ((0, 0), (0, spec.groups * size - spec.columns)))
        codes = codes.reshape(spec.rows, spec.groups, size)
    stored = build.initializer(f"{name}.codes", unsigned(codes, spec.bits))
    chosen = None
    if len(used) > 1:
        packed = unsigned(unit(choice), max(3, (len(used) - 1).bit_length()))
        index = build.initializer(f"{name}.choice", packed)
        chosen = build.op("Mul", build.cast(index, ir.DataType.INT32), build.constant(1 << spec.bits, np.int32))
    return stored, chosen, _scale(build, weight, name, unit)


def _scale(build: Builder, weight: QuantizedTensor, name: str, unit: Callable[[Array], Array]) -> ir.Value:
    """Scales as they are stored, and what makes them float32."""
    kind = weight.spec.scale
    if kind == "fp32":
        return build.initializer(f"{name}.scale", unit(weight.scale.numpy()))
    if kind == "pow2":
        every = QuantizedTensor(weight.spec, weight.packed, torch.arange(256, dtype=torch.uint8, device="cpu")).scales()
        index = build.initializer(f"{name}.scale", unit(weight.scale.numpy()))
        table = build.initializer("dybit.pow2", every.numpy())
        scale = build.op("Gather", table, build.cast(index, ir.DataType.INT32))
    else:
        exact = ml_dtypes.bfloat16 if kind == "bf16" else ml_dtypes.float8_e4m3fn
        index = build.initializer(f"{name}.scale", unit(weight.scale.float().numpy()).astype(exact))
        scale = build.cast(index, ir.DataType.FLOAT)
        if weight.tensor_scale is not None:
            scale = build.op("Mul", scale, build.constant(weight.tensor_scale.item()))
    return scale


def _looked_up(
    build: Builder, codes: ir.Value, choice: ir.Value | None, scale: ir.Value, spec: TensorSpec, weight: QuantizedTensor
) -> ir.Value:
    index = build.cast(codes, ir.DataType.INT32)
    if choice is not None:
        index = build.op("Add", index, choice)
    used, _ = _used(weight)
    table = np.nan_to_num(np.concatenate([book.values for book in used])).astype(np.float32)
    return build.op("Mul", build.op("Gather", build.constant(table), index), scale)
