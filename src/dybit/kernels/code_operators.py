"""The operators ``torch.ops.dybit.dequantize``, ``fake_quantize`` and ``fake_quantize_dynamic``.

They are opaque to ``torch.compile`` and ``torch.export``. :mod:`dybit.kernels.codes` and
:mod:`dybit.kernels.rounding` compute them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dybit.formats import catalogue
from dybit.kernels import codes, rounding

_LIBRARY = torch.library.Library("dybit", "DEF")


def _dequantize(
    packed: Tensor, scale: Tensor, choice: Tensor | None, family: str, count: int, bits: int, group_size: int
) -> Tensor:
    return codes.decode(packed, scale, choice, catalogue.family(family).books, count, group_size or None)


def _fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, format: str) -> Tensor:
    return rounding.fake_quantize(x, scale, offset, catalogue.family(format).books[0])


def _fake_quantize_dynamic(x: Tensor, format: str, reach: float, group_size: int) -> Tensor:
    return rounding.fake_quantize_dynamic(x, catalogue.family(format).books[0], reach, group_size)


SCHEMAS = {
    # packed (rows, bytes) uint8; scale (rows|1, groups|1) float32; choice as scale, uint8, the codebook of each unit;
    # group_size 0: one group a row. Returns (rows, count) float32.
    "dequantize": (
        "(Tensor packed, Tensor scale, Tensor? choice, str family, int count, int bits, int group_size) -> Tensor"
    ),
    # x of any shape and floating dtype; scale and offset broadcast against it. Returns the values of its codes, of
    # x's shape and dtype; NaN stays NaN.
    "fake_quantize": "(Tensor x, Tensor scale, Tensor? offset, str format) -> Tensor",
    # The same with dynamic scales: the largest magnitude of each last-dimension row, or group of group_size (0: the
    # row), is mapped to reach. A group with NaN or infinity becomes NaN.
    "fake_quantize_dynamic": "(Tensor x, str format, float reach, int group_size) -> Tensor",
}


def _dequantize_shape(
    packed: Tensor, scale: Tensor, choice: Tensor | None, family: str, count: int, bits: int, group_size: int
) -> Tensor:
    return packed.new_empty(packed.shape[0], count, dtype=torch.float32)


def _same_shape(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _straight_through(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Passes gradients through rounding unchanged. Scales get none; ``qat`` has operators that learn them."""
    return (grad, *(None,) * (ctx.inputs - 1))  # type: ignore[attr-defined]


def _count_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.inputs = len(inputs)  # type: ignore[attr-defined]


def _register() -> None:
    implementations: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "dequantize": (_dequantize, _dequantize_shape),
        "fake_quantize": (_fake_quantize, _same_shape),
        "fake_quantize_dynamic": (_fake_quantize_dynamic, _same_shape),
    }
    for name, (implementation, shape) in implementations.items():
        _LIBRARY.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dybit::{name}", shape, lib=_LIBRARY)
        if name != "dequantize":
            torch.library.register_autograd(
                f"dybit::{name}", _straight_through, setup_context=_count_inputs, lib=_LIBRARY
            )


_register()
dequantize = torch.ops.dybit.dequantize
fake_quantize = torch.ops.dybit.fake_quantize
fake_quantize_dynamic = torch.ops.dybit.fake_quantize_dynamic
