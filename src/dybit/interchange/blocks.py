"""Weights as blocks of FP4 E2M1 with MXFP4's or NVFP4's scales, and back, value for value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

# The value of E2M1's 1 in formats that have its values; their codes are in the same order.
UNITS = {"s4r2": 0.5, "e2m1": 1.0, "mxfp4": 1.0, "nvfp4": 1.0}
MX_BLOCK, NV_BLOCK = 32, 16
_E8M0_BIAS, _POW2_BIAS, _E8M0_NAN = 127, 64, 255
_READ_AS = "s4r2"


@dataclass(frozen=True)
class Blocks:
    """A weight in the layout that MXFP4 and NVFP4 share.

    Attributes:
        packed: E2M1 codes, two a byte, the first in the low half: uint8 of shape (rows, columns / 2).
        scale: One a block: E8M0 exponents, uint8 (MXFP4), or float8_e4m3fn (NVFP4), of shape (rows, columns / block).
        divisor: For NVFP4, by which all scales are divided: float32 of shape (1,); None for MXFP4.
    """

    packed: Tensor
    scale: Tensor
    divisor: Tensor | None = None

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return MX_BLOCK if self.divisor is None else NV_BLOCK


def to_blocks(weight: QuantizedTensor, name: str) -> Blocks:
    """A weight as blocks.

    NVFP4 divides by a number where dybit multiplies by one. Where no number of float32 has the reciprocal's effect (it
    always has for a power of two), values differ by two units in the last place of float32 at most.

    Args:
        weight: Of a format in :data:`UNITS`, in groups of 32 with scales ``pow2``, or of 16 with ``e4m3``.
        name: For errors.

    Raises:
        DyBitError: It has another format, scale or group size, or columns that the group size does not divide.
    """
    spec = weight.spec
    unit = UNITS.get(spec.family)
    kind = {(MX_BLOCK, "pow2"): "mxfp4", (NV_BLOCK, "e4m3"): "nvfp4"}.get((spec.group_size or 0, spec.scale))
    if unit is None or kind is None or len(spec.shape) != 2 or spec.transposed or spec.columns % (spec.group_size or 1):
        raise DyBitError(
            f"{name!r} is {spec.family} of shape {spec.shape}, {spec.scale} scales, group_size={spec.group_size}; "
            "MXFP4 is s4r2, scale='pow2', group_size=32, NVFP4 s4r2, scale='e4m3', group_size=16, dividing the columns"
        )
    packed = weight.packed.reshape(spec.rows, spec.columns // 2)
    if kind == "mxfp4":
        if bool((weight.scale > 127).any()):
            raise DyBitError(f"{name!r} has a negative scale, which MXFP4 does not allow")
        exponent = weight.scale.to(torch.int16) - _POW2_BIAS + _E8M0_BIAS - (1 if unit == 0.5 else 0)
        return Blocks(packed, exponent.to(torch.uint8))
    if bool((weight.scale.float() < 0).any()):
        raise DyBitError(f"{name!r} has a negative scale, which NVFP4 does not allow")
    assert weight.tensor_scale is not None
    return Blocks(packed, weight.scale, _reciprocal(weight.tensor_scale * unit))


def from_blocks(blocks: Blocks, name: str) -> QuantizedTensor:
    """Blocks as a weight of dybit, with exactly their values: ``s4r2``, or ``e2m1`` for extreme exponents.

    Args:
        blocks: As :func:`to_blocks` makes them.
        name: For errors.

    Raises:
        DyBitError: A shape or type does not fit, or a scale is NaN or negative.
    """
    packed, scale, divisor = blocks.packed, blocks.scale, blocks.divisor
    kind = torch.uint8 if divisor is None else torch.float8_e4m3fn
    if packed.dtype != torch.uint8 or packed.ndim != 2 or scale.dtype != kind or scale.ndim != 2:
        raise DyBitError(f"{name!r} has codes {_said(packed)} and scales {_said(scale)}, which is not a block format")
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if scale.shape != (rows, columns // blocks.block) or columns % blocks.block or not packed.numel():
        raise DyBitError(f"{name!r} has codes {_said(packed)} and scales {_said(scale)}, which do not fit each other")
    packed = torch.where(packed & 15 == 8, packed & 240, packed)  # negative zero is written as zero
    packed = torch.where(packed & 240 == 128, packed & 15, packed)
    if divisor is None:
        if bool((scale == _E8M0_NAN).any()):
            raise DyBitError(f"{name!r} has a scale that is not a number")
        stored = scale.to(torch.int16) - _E8M0_BIAS + _POW2_BIAS + 1  # s4r2 is E2M1 halved
        if bool((stored >= 0).all()) and bool((stored <= 127).all()):
            return _made("pow2", blocks, packed, stored.to(torch.uint8))
        exponent = scale.int() - _E8M0_BIAS  # beyond what dybit stores as a power of two
        return _made("fp32", blocks, packed, torch.ldexp(torch.ones_like(exponent).float(), exponent), family="e2m1")
    if divisor.numel() != 1 or not bool(torch.isfinite(divisor).all()) or float(divisor) <= 0:
        raise DyBitError(f"{name!r} has a global scale that is not a positive number")
    exact = scale.float() / divisor.float() * 2
    if not bool(torch.isfinite(exact).all()) or bool((exact < 0).any()):
        raise DyBitError(f"{name!r} has a scale that is not a number, or is negative")
    factor = (2 / divisor.float()).reshape(1)
    if torch.equal(scale.float() * factor, exact):
        return _made("e4m3", blocks, packed, scale, factor)
    return _made("fp32", blocks, packed, exact)


def _made(
    kind: str,
    blocks: Blocks,
    packed: Tensor,
    scale: Tensor,
    factor: Tensor | None = None,
    family: str = _READ_AS,
) -> QuantizedTensor:
    shape = (packed.shape[0], 2 * packed.shape[1])
    spec = TensorSpec(family, shape, "group", blocks.block, kind, "group")  # type: ignore[arg-type]
    return QuantizedTensor(spec, packed.reshape(spec.packed_shape).contiguous(), scale, None, factor)


def _reciprocal(factor: Tensor) -> Tensor:
    """The number that to divide an E4M3 by comes closest to multiplying it by a factor: float32 of shape (1,)."""
    significands = torch.arange(8, 16, dtype=torch.float32, device="cpu")
    best = 1 / factor
    candidates = [best]
    for direction in (torch.inf, -torch.inf):
        near = best
        for _ in range(2):
            near = torch.nextafter(near, torch.tensor(direction, dtype=torch.float32, device="cpu"))
            candidates.append(near)
    wrong = [int((significands / c != significands * factor).sum()) for c in candidates]
    return candidates[wrong.index(min(wrong))].reshape(1)


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
