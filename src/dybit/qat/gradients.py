"""Rounding with gradients: straight-through for the rounded tensor, and learned step sizes.

The gradients are those of LSQ (Esser et al., ICLR 2020) and LSQ+ (Bhalgat et
al., 2020), written for any codebook. With levels l, scale s, offset o and x̂ = s · l(x) + o, where l(x) is the level
nearest to (x - o) / s:

* ∂x̂/∂x is 1 from the lowest level to the highest, and 0 outside;
* ∂x̂/∂s is l(x) - (x - o) / s inside, and l(x) outside;
* ∂x̂/∂o is 0 inside and 1 outside.

The learned parameters are the logarithm of s / b, where b is the scale chosen from data, and the offset in steps. One
step of an optimizer then changes any scale by about the same share. The step size a is the mean distance of adjacent
levels times b; for integer levels it is LSQ's. Q is the largest magnitude in steps, N the number of elements that
share the scale. LSQ's gradient of a, ∂L/∂a / √(N · Q), changes a by the relative amount ∂L/∂a / √(N · Q) / a. The
gradient used here is that of the logarithm times the constant 1 / (a² √(N · Q)). At s = b it makes the same change,
and it does not diverge as s becomes small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dybit.formats import catalogue
from dybit.formats.codebook import Codebook
from dybit.kernels import rounding
from dybit.kernels.code_operators import fake_quantize
from dybit.tensors.quantized_tensor import TensorSpec

_SMALLEST_SHARE = 2.0**-10  # relative to the largest scale of a weight: smaller scales learn more slowly
_SMALLEST_BASE = 2.0**-30


@lru_cache(maxsize=256)
def learning_factors(books: tuple[Codebook, ...], device: torch.device) -> Tensor:
    """Returns :func:`learning_factor` of some codebooks: float32 of shape (books, 1)."""
    return torch.tensor([[learning_factor(book)] for book in books], dtype=torch.float32, device=device)


def _round(x: Tensor, scale: Tensor, offset: Tensor | None, format: str) -> Tensor:
    """Calls ``torch.ops.dybit.fake_quantize``, if possible without the dispatcher: twice as fast on small layers."""
    if _callable_directly(x):
        return rounding.fake_quantize(x, scale, offset, catalogue.family(format).books[0])
    return cast(Tensor, fake_quantize(x, scale, offset, format))


def _callable_directly(x: Tensor) -> bool:
    """Whether a tensor has memory and no compiler needs to see the operator."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


@cache
def spacing(book: Codebook) -> float:
    """Returns the mean distance of adjacent levels."""
    return float(book.levels[-1] - book.levels[0]) / (len(book.levels) - 1)


@cache
def learning_factor(book: Codebook) -> float:
    """Returns the factor that turns s · ∂L/∂s / b² / √N into the gradient of the logarithm of a scale of N elements."""
    step = spacing(book)
    return 1 / (step**2 * math.sqrt(np.abs(book.levels).max() / step))


@dataclass(frozen=True)
class Layout:
    """Splits a weight, or some rows of its matrix, into the units that share a scale.

    All views are taken within one autograd function: on small layers, a node for each would cost more than rounding.

    Args:
        spec: How the weight is stored.
        rows: Whether the tensor is some rows of the matrix, (count, columns).
    """

    spec: TensorSpec
    rows: bool = False

    def split(self, x: Tensor) -> Tensor:
        """Returns the units: float32 of shape (units, length). The last group of a row is padded with zeros."""
        matrix = (x if self.rows else self.spec.to_matrix(x)).float()
        if self.spec.granularity == "tensor":
            return matrix.reshape(1, -1)
        if self._grouped:
            padded = functional.pad(matrix, (0, self._filled - self.spec.columns))
            return padded.view(-1, cast(int, self.spec.group_size))
        return matrix

    def join(self, units: Tensor, like: Tensor) -> Tensor:
        """Inverts :meth:`split`, in the shape and type of ``like``."""
        matrix = units.view(-1, self.spec.columns) if not self._grouped else units.view(-1, self._filled)
        if self._grouped and self._filled > self.spec.columns:
            matrix = matrix[:, : self.spec.columns].contiguous()
        return (matrix if self.rows else self.spec.from_matrix(matrix)).to(like.dtype)

    @property
    def _grouped(self) -> bool:
        return self.spec.group_size is not None and self.spec.columns > self.spec.group_size

    @property
    def _filled(self) -> int:
        return self.spec.groups * (self.spec.group_size or 0)


def _base(chosen: Tensor) -> Tensor:
    """Returns the chosen scales by which gradients are divided, bounded away from zero.

    Scales of zero or tiny units are so small that their squares are zero.
    """
    size = chosen.abs()
    return torch.maximum(size, (size.amax() * _SMALLEST_SHARE).clamp(min=_SMALLEST_BASE))


class _RoundWeight(torch.autograd.Function):
    """See :func:`round_weight`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        weight: Tensor,
        log_scale: Tensor,
        scale: Tensor,
        chosen: Tensor,
        choice: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        family, x, scale = layout.spec.family, layout.split(weight), scale.view(-1, 1)
        if choice is None:
            rounded = _round(x, scale, None, family)
        else:
            choice = choice.view(-1, 1)
            rounded = rounding.round_chosen(x, scale, choice, catalogue.family(family).books)
        ctx.save_for_backward(weight, rounded, scale, chosen, choice)
        ctx.layout = layout
        return layout.join(rounded, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        weight, rounded, scale, chosen, choice = ctx.saved_tensors
        layout = ctx.layout
        books = catalogue.family(layout.spec.family).books
        x, grad = layout.split(weight), layout.split(grad)
        x_grad, slope = rounding.pass_through(x, grad, rounded, scale, books, choice)
        log_grad = None
        if ctx.needs_input_grad[1]:  # slope is s · ∂L/∂s
            factors = learning_factors(books, weight.device)
            factor = factors if choice is None else factors.index_select(0, choice.view(-1).to(torch.int32))
            constant = factor / (_base(chosen).view(-1, 1).square() * math.sqrt(x.shape[1]))
            log_grad = slope.mul_(constant).view(chosen.shape)
        return layout.join(x_grad, weight), log_grad, None, None, None, None


def round_weight(
    weight: Tensor, log_scale: Tensor, scale: Tensor, chosen: Tensor, choice: Tensor | None, layout: Layout
) -> Tensor:
    """Rounds a weight with a scale and a codebook for every unit; NaN stays NaN.

    Args:
        weight: Floating point, as the layout says. Its gradient is straight-through.
        log_scale: The learned parameter, one number per unit. Its value is not read; it receives the gradient.
        scale: The scales in use, float32 of the same shape, nonzero.
        chosen: The scales chosen from data, float32 of the same shape.
        choice: The codebook of every unit, uint8 of the same shape; None for a family of one.
        layout: How units lie in the weight.

    Returns:
        Of the shape and type of ``weight``, contiguous.
    """
    rounded = _RoundWeight.apply(weight, log_scale, scale, chosen, choice, layout)  # type: ignore[no-untyped-call]
    return cast(Tensor, rounded)


class _RoundInput(torch.autograd.Function):
    """See :func:`round_input`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        log_scale: Tensor,
        shift: Tensor | None,
        scale: Tensor,
        chosen: Tensor,
        offset: Tensor | None,
        format: str,
    ) -> Tensor:
        rounded = _round(x, scale, offset, format)
        ctx.save_for_backward(x, rounded, scale, chosen, offset)
        ctx.format = format
        return rounded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, rounded, scale, chosen, offset = ctx.saved_tensors
        book = catalogue.family(ctx.format).books[0]
        shared = math.sqrt(max(1, x.numel() // max(1, len(x))))  # the features of a sample share the scale
        x_grad, slope, clipped = rounding.pass_through_whole(x, grad, rounded, scale, offset, book)
        log_grad = shift_grad = None
        if ctx.needs_input_grad[1]:  # slope is s · ∂L/∂s
            log_grad = slope.mul_(learning_factors((book,), x.device)[0] / (_base(chosen).square() * shared))
        if ctx.needs_input_grad[2]:
            # The shift and the gradient's factor both count in steps, hence one more factor of the spacing.
            factor = learning_factor(book) * spacing(book) / (chosen * shared)
            shift_grad = torch.zeros_like(scale) if clipped is None else clipped * factor
        return x_grad, log_grad, shift_grad, None, None, None, None


def round_input(
    x: Tensor,
    log_scale: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    chosen: Tensor,
    offset: Tensor | None,
    format: str,
) -> Tensor:
    """Rounds an input with one scale and an optional offset; NaN stays NaN.

    Args:
        x: Floating point of any shape, samples first. Its gradient is straight-through.
        log_scale: The learned parameter, float32 of shape (1,). Its value is not read; it receives the gradient.
        shift: The learned parameter of the offset, likewise, or None.
        scale: The scale in use, float32 of shape (1,).
        chosen: The scale chosen from data, float32 of shape (1,).
        offset: The offset in use, float32 of shape (1,), or None.
        format: Name of a single format.

    Returns:
        Of the shape and type of ``x``.
    """
    rounded = _RoundInput.apply(x, log_scale, shift, scale, chosen, offset, format)  # type: ignore[no-untyped-call]
    return cast(Tensor, rounded)
