"""The types of scales: which numbers each can hold, and how they are stored (docs/format.md, section 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dybit.formats.scaling import ScaleType

TINIEST = 2.0**-126  # smallest normal float: a smaller scale would lose precision or be zero
SCALE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "pow2": torch.uint8, "e4m3": torch.float8_e4m3fn}
_POW2_EXPONENTS = (-64, 63)
_POW2_BIAS = 64
_E4M3_MAX = 448.0
_E4M3_MIN = 2.0**-9
E4M3_SPAN = _E4M3_MAX / 2.0**-6  # ratio of the largest to the smallest normal number


def scale_candidates(scale: Tensor, scale_type: ScaleType, tensor_scale: float = 1.0) -> list[Tensor]:
    """Returns the numbers of a type to try in place of ideal scales. None of them is zero.

    Args:
        scale: float32 of any shape. NaN stays NaN.
        scale_type: The type.
        tensor_scale: The factor that E4M3 scales share.

    Returns:
        float32 tensors of the shape of ``scale``: the nearest number, or the powers of two below and above.
    """
    if scale_type == "e4m3":
        ratio = (scale / tensor_scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()
        smallest = torch.full_like(ratio, _E4M3_MIN)
        ratio = torch.where(ratio == 0, torch.where(scale < 0, -smallest, smallest), ratio)
        return [ratio * tensor_scale]
    usable = normal_numbers(scale)
    if scale_type == "bf16":
        largest = largest_scale(scale_type)
        return [usable.to(torch.bfloat16).float().clamp(-largest, largest)]
    if scale_type == "pow2":
        exponent = usable.abs().log2().clamp(*_POW2_EXPONENTS)
        sign = torch.where(scale < 0, -torch.ones_like(scale), 1.0)
        return [torch.ldexp(sign, exponent.floor()), torch.ldexp(sign, exponent.ceil())]
    return [usable]


def normal_numbers(scale: Tensor) -> Tensor:
    """Replaces scales below the smallest normal float by it; zero becomes positive."""
    return torch.where(scale < 0, scale.clamp(max=-TINIEST), scale.clamp(min=TINIEST))


def nearest_scale(scale: Tensor, scale_type: ScaleType, tensor_scale: Tensor | None = None) -> Tensor:
    """Rounds scales to the nearest numbers of their type; to powers of two by the nearest logarithm.

    Args:
        scale: float32 of any shape. NaN stays NaN.
        scale_type: The type.
        tensor_scale: The factor of E4M3 scales, float32 of shape (1,), or None.
    """
    found = scale_candidates(scale, scale_type, 1.0 if tensor_scale is None else float(tensor_scale))
    if len(found) == 1:
        return found[0]
    lower, upper = found
    return torch.where(scale.abs() > lower.abs() * math.sqrt(2), upper, lower)


def largest_scale(scale_type: ScaleType, tensor_scale: float = 1.0) -> float:
    """Returns the largest number of a type; ``tensor_scale`` is the factor of E4M3 scales."""
    if scale_type == "e4m3":
        return _E4M3_MAX * tensor_scale
    return 2.0 ** _POW2_EXPONENTS[1] if scale_type == "pow2" else torch.finfo(SCALE_DTYPES[scale_type]).max


def e4m3_factor(largest: float) -> float:
    """Returns the factor with which a tensor's largest scale becomes the largest E4M3 number, 448, as in NVFP4."""
    if largest == 0:
        return 1.0
    ratio = float(torch.tensor(largest / _E4M3_MAX, dtype=torch.float32, device="cpu"))
    return max(ratio, TINIEST / _E4M3_MIN)  # the smallest scale must be a normal float


def store_scales(scale: Tensor, scale_type: ScaleType, tensor_scale: float = 1.0) -> Tensor:
    """Converts scales to their stored type, one of :data:`SCALE_DTYPES`. Exact for numbers of the type.

    Args:
        scale: float32 of any shape.
        scale_type: The type.
        tensor_scale: The factor that E4M3 scales share.
    """
    if scale_type == "pow2":  # the sign, and seven bits of exponent
        exponent = scale.abs().log2().round().to(torch.int32) + _POW2_BIAS
        return (exponent + 128 * (scale < 0)).to(torch.uint8)
    if scale_type == "e4m3":
        return (scale / tensor_scale).to(torch.float8_e4m3fn)
    return scale.to(SCALE_DTYPES[scale_type])


def read_scales(stored: Tensor, scale_type: ScaleType, tensor_scale: Tensor | None = None) -> Tensor:
    """Returns stored scales as numbers: float32 of the shape of ``stored``.

    Args:
        stored: What :func:`store_scales` returned.
        scale_type: The type.
        tensor_scale: The factor of E4M3 scales, float32 of shape (1,), or None.
    """
    if scale_type == "pow2":
        exponent = (stored & 127).float() - _POW2_BIAS
        sign = 1.0 - 2.0 * (stored >> 7).float()
        return torch.ldexp(sign, exponent)
    scale = stored.float()
    return scale if tensor_scale is None else scale * tensor_scale
