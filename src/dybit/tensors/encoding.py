"""Rounds floating-point weights to codes and packs them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats.scaling import Method
from dybit.kernels.codes import encode
from dybit.kernels.packed_codes import pack, spans
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec
from dybit.tensors.scale_search import Scales, choose_scales, largest_of_groups
from dybit.tensors.scale_types import E4M3_SPAN, largest_scale, store_scales

_LARGEST = torch.finfo(torch.float32).max
_ORDERED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def quantize(
    weight: Tensor,
    spec: TensorSpec,
    *,
    method: Method = "mse",
    percentile: float = 99.99,
    importance: Tensor | None = None,
) -> QuantizedTensor:
    """Quantizes a weight: chooses scales and codebooks and rounds to the nearest.

    Args:
        weight: Finite floating point of shape ``spec.shape``.
        spec: How it is stored.
        method: How scales are chosen (see :func:`dybit.tensors.scale_search.choose_scales`).
        percentile: For ``method="percentile"``.
        importance: Importance of every column, of shape (columns,) or (rows, columns), or None.

    Raises:
        DyBitError: ``weight`` has another shape, is not floating point, or holds NaN or infinity; or as
            :func:`check_range`.
    """
    return quantize_judged(weight, spec, method=method, percentile=percentile, importance=importance)[0]


def quantize_judged(
    weight: Tensor,
    spec: TensorSpec,
    *,
    method: Method = "mse",
    percentile: float = 99.99,
    importance: Tensor | None = None,
) -> tuple[QuantizedTensor, float]:
    """As :func:`quantize`, and also returns the squared error over all elements."""
    check_weight(weight, spec.shape)
    check_range(weight, spec)
    matrix = spec.to_matrix(weight.detach())
    scales = choose_scales(
        matrix,
        spec.formats,
        granularity=spec.granularity,
        group_size=spec.group_size,
        scale_type=spec.scale,
        choice_granularity=spec.choice,
        method=method,
        percentile=percentile,
        importance=importance,
    )
    return encode_matrix(matrix, spec, scales), scales.error


def encode_matrix(matrix: Tensor, spec: TensorSpec, scales: Scales) -> QuantizedTensor:
    """Rounds a matrix (rows, columns) to the nearest codes at given scales and packs it."""
    packed = encode(matrix.float(), scales.scale, scales.choice, spec.formats.books, spec.group_size)
    return _assemble(packed, spec, scales)


def requantize(old: QuantizedTensor, weight: Tensor) -> QuantizedTensor:
    """Quantizes new values of a weight at its current scales or at new ones, whichever has the smaller squared error.

    Args:
        old: The weight as it is stored.
        weight: Its new values, finite floating point of shape ``old.spec.shape``.

    Raises:
        DyBitError: As for :func:`quantize`.
    """
    new = quantize(weight, old.spec)
    scale, choice = old.scales(), old.choices()
    kept = Scales(scale, None if choice is None else choice.expand(scale.shape), 1.0, 0.0)
    packed = encode_matrix(old.spec.to_matrix(weight.detach()), old.spec, kept).packed
    trials = (replace(old, packed=packed), new)
    return min(trials, key=lambda trial: float((trial.dequantize().double() - weight).square().sum()))


def pack_codes(chosen: Tensor, spec: TensorSpec, scales: Scales) -> QuantizedTensor:
    """Packs codes that were chosen for given scales: uint8 of shape (rows, columns)."""
    return _assemble(pack(chosen, spec.bits, spec.group_size), spec, scales)


def _assemble(packed: Tensor, spec: TensorSpec, scales: Scales) -> QuantizedTensor:
    choice = None
    if scales.choice is not None:
        rows, units = spec.unit_shape(spec.choice)
        choices = scales.choice[:rows, :units]  # one per scale: coarser choices are repeated in it
        choice = pack(choices.reshape(1, -1) if units == 1 else choices, spec.choice_bits)
    tensor_scale = scales.scale.new_tensor([scales.tensor_scale]) if spec.scale == "e4m3" else None
    return QuantizedTensor(
        spec,
        packed.view(spec.packed_shape),
        store_scales(scales.scale, spec.scale, scales.tensor_scale),
        choice,
        tensor_scale,
    )


def unit_rows(units: Tensor, spec: TensorSpec) -> Tensor:
    """The scale or choice of every element: (1, 1), (rows, 1) or (rows, columns) from a table of units."""
    if units.shape[1] == 1:
        return units
    parts, column = [], 0
    for _, groups, length in spans(spec.columns, spec.group_size):
        parts.append(units[:, column : column + groups].repeat_interleave(length, dim=1))
        column += groups
    return torch.cat(parts, dim=1)


def check_weight(weight: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Checks that a weight can be quantized.

    Raises:
        DyBitError: It is empty, not floating point, of another shape, or holds NaN, infinity, or values beyond float32.
    """
    if not weight.is_floating_point():
        raise DyBitError(f"weight must be floating point, not {weight.dtype}")
    if weight.dtype not in _ORDERED:
        raise DyBitError(f"weight must not be {weight.dtype}: multiply it by its scales in float32 first")
    if weight.numel() == 0:
        raise DyBitError(f"weight must not be empty, but has shape {tuple(weight.shape)}")
    if shape is not None and tuple(weight.shape) != shape:
        raise DyBitError(f"weight must have shape {shape}, not {tuple(weight.shape)}")
    if weight.is_meta:
        raise DyBitError("weight is on the meta device and has no values")
    if all(abs(float(end)) <= _LARGEST for end in torch.aminmax(weight.detach())):
        return  # both are NaN if any element is NaN
    step = max(1, (1 << 20) * weight.shape[0] // weight.numel())  # without copying the weight
    for start in range(0, weight.shape[0], step):
        bad = ~torch.isfinite(weight.detach()[start : start + step].float())
        if bool(bad.any()):
            first = [int(i) for i in bad.nonzero()[0]]
            first[0] += start
            value = float(weight[tuple(first)])
            beyond = ", beyond float32," if math.isfinite(value) else ""
            raise DyBitError(f"weight holds {value}{beyond} at position {tuple(first)}")


def check_range(weight: Tensor, spec: TensorSpec) -> None:
    """Checks that scales of the spec's type can hold a weight.

    FP32 and BF16 scales can hold every weight. Units that are far smaller than the rest of a tensor may become zero.

    Args:
        weight: Finite floating point of shape ``spec.shape``.
        spec: How it will be stored.

    Raises:
        DyBitError: Scales are powers of two and would clip the largest weight, or they are E4M3 and the largest weight
            is so large that most channels or groups would lose precision or become zero.
    """
    if spec.scale not in ("pow2", "e4m3"):
        return
    sizes = largest_of_groups(spec.to_matrix(weight.detach()), spec.group_size).float()
    largest = float(sizes.max())
    if spec.scale == "pow2":
        highest = largest_scale("pow2") * max(float(np.abs(book.levels).max()) for book in spec.formats.books)
        if largest > highest:
            raise DyBitError(
                f"weight holds a magnitude of {largest:.3g}, above {highest:.3g}, to which scale='pow2' reaches in "
                f"{spec.family}; clip the weight, or use scale='fp32' or 'bf16'"
            )
    elif spec.granularity != "tensor" and largest:
        middle = float(sizes[sizes > 0].median())
        if middle * E4M3_SPAN < largest:
            raise DyBitError(
                f"weight holds a magnitude of {largest:.3g}, but most of its {spec.granularity}s hold at most "
                f"{middle:.3g}, and scale='e4m3' spans a factor of {E4M3_SPAN:.0f}: these would become zero or coarse; "
                "clip the weight, or use scale='fp32' or 'bf16'"
            )
