"""Rounding that learns: straight-through gradients for what is rounded, and those of learned step sizes.

The gradients are those of LSQ (Esser et al., ICLR 2020) and LSQ+ (Bhalgat et
al., 2020), written for any codebook. With levels l, scale s, offset o and x̂ = s · l(x) + o, where l(x) is the level
nearest to (x - o) / s:

* ∂x̂/∂x is 1 from the lowest level to the highest, and 0 outside;
* ∂x̂/∂s is l(x) - (x - o) / s inside, and l(x) outside;
* ∂x̂/∂o is 0 inside and 1 outside.

What is learned is the logarithm of s / b, where b is the scale that was chosen from the data, and the offset counted in
steps, so that one step of an optimizer changes any scale by about the same share. The step size a is the mean distance
of adjacent levels times b, which is LSQ's where the levels are integers; Q is the largest magnitude in steps, and N the
number of elements that share the scale. LSQ's gradient of a, ∂L/∂a / √(N · Q), changes a by ∂L/∂a / √(N · Q) / a of its
own size. The gradient given here is the true one of the logarithm times the constant 1 / (a² √(N · Q)): at s = b the
same change, and no running away as s becomes small.
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
from dybit.kernels import codes
from dybit.kernels.code_operators import fake_quantize, grid, lookup
from dybit.tensors.quantized_tensor import TensorSpec


class FamilyTable:
    """The codebooks of a family as tensors, to round at once what uses different ones.

    Args:
        name: Name of the family.
        device: Where the tensors live.

    Attributes:
        ends: The lowest and the highest level of every codebook: float32 of shape (books, 2).
        factors: Of the gradient of a logarithm, likewise: float32 of shape (books, 1).
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.books = catalogue.family(name).books
        ends = np.array([(book.levels[0], book.levels[-1]) for book in self.books])
        self.ends = torch.tensor(ends, dtype=torch.float32, device=device)
        factors = [[learning_factor(book)] for book in self.books]
        self.factors = torch.tensor(factors, dtype=torch.float32, device=device)
        self._unit, self._limit = grid(np.concatenate([book.midpoints for book in self.books]))
        if self._unit:
            # Entry 2k is the point k · unit, entry 2k+1 the open interval above it, in which no midpoint lies.
            steps = torch.arange(-2 * self._limit, 2 * self._limit + 1, dtype=torch.float32, device=device)
            points = steps * (self._unit / 2)
            self._size = len(points)
            self._values = torch.cat([lookup(book, device).round(points) for book in self.books])

    def round(self, x: Tensor, choice: Tensor) -> Tensor:
        """Returns the nearest level of each element.

        Args:
            x: float32 of shape (units, length), without NaN.
            choice: The codebook of every unit, integers of shape (units, 1).
        """
        if self._unit:
            position = (x * (1.0 / self._unit)).clamp_(-self._limit, self._limit)
            index = position.floor().add_(position.ceil_()).add_(2 * self._limit).to(torch.int32)
            index += choice.to(torch.int32) * self._size
            return self._values.index_select(0, index.reshape(-1)).view(x.shape)
        result = torch.empty_like(x)
        for place, book in enumerate(self.books):
            rows = (choice == place).view(-1).nonzero().view(-1)
            if len(rows):
                result[rows] = lookup(book, x.device).round(x[rows])
        return result


@lru_cache(maxsize=256)
def family_table(name: str, device: torch.device) -> FamilyTable:
    """Returns the cached :class:`FamilyTable` of a family on a device."""
    return FamilyTable(name, device)


def _plain_round(x: Tensor, scale: Tensor, choice: Tensor, family: str) -> Tensor:
    """Rounds units of several codebooks, float32 of shape (units, length), in plain torch; NaN stays NaN."""
    ratio = x / scale
    unknown = torch.isnan(ratio)
    value = family_table(family, x.device).round(ratio.masked_fill_(unknown, 0.0), choice)
    return value.mul_(scale).masked_fill_(unknown, math.nan)


def _round(x: Tensor, scale: Tensor, offset: Tensor | None, format: str) -> Tensor:
    """``torch.ops.dybit.fake_quantize``, past the dispatcher where nobody traces: half the time, on small layers."""
    done = None
    if _callable_directly(x):
        done = codes.fake_quantize(x, scale, offset, catalogue.family(format).books[0])
    return cast(Tensor, fake_quantize(x, scale, offset, format)) if done is None else done


def _callable_directly(x: Tensor) -> bool:
    """Whether a tensor has memory, and no compiler is to see the operator."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


@cache
def spacing(book: Codebook) -> float:
    """The mean distance of adjacent levels."""
    return float(book.levels[-1] - book.levels[0]) / (len(book.levels) - 1)


@cache
def learning_factor(book: Codebook) -> float:
    """What turns s · ∂L/∂s / b² / √N into the gradient given to the logarithm of a scale that N elements share."""
    step = spacing(book)
    return 1 / (step**2 * math.sqrt(np.abs(book.levels).max() / step))


@dataclass(frozen=True)
class Layout:
    """How a weight, or some rows of its matrix, falls into the units that share a scale.

    All views are taken within one autograd function: on small layers, a node for each would cost more than rounding.

    Args:
        spec: How the weight is stored.
        rows: Whether it is rows of the matrix, (count, columns).
    """

    spec: TensorSpec
    rows: bool = False

    def split(self, x: Tensor) -> Tensor:
        """The units: float32 of shape (units, length), the last groups of rows filled up with zeros."""
        matrix = (x if self.rows else self.spec.to_matrix(x)).float()
        if self.spec.granularity == "tensor":
            return matrix.reshape(1, -1)
        if self._grouped:
            padded = functional.pad(matrix, (0, self._filled - self.spec.columns))
            return padded.view(-1, cast(int, self.spec.group_size))
        return matrix

    def join(self, units: Tensor, like: Tensor) -> Tensor:
        """The inverse, in the shape and type of ``like``."""
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
            direct = _callable_directly(x)
            done = codes.round_chosen(x, scale, choice, catalogue.family(family).books) if direct else None
            rounded = _plain_round(x, scale, choice, family) if done is None else done
        ctx.save_for_backward(weight, rounded, scale, chosen, choice)
        ctx.layout = layout
        return layout.join(rounded, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        weight, rounded, scale, chosen, choice = ctx.saved_tensors
        layout = ctx.layout
        table = family_table(layout.spec.family, weight.device)
        index = None if choice is None else choice.view(-1).to(torch.int32)
        x, grad = layout.split(weight), layout.split(grad)
        done = codes.pass_through(x, grad, rounded, scale, table.ends, choice) if _callable_directly(grad) else None
        if done is None:
            low, high = (table.ends if index is None else table.ends.index_select(0, index)).split(1, dim=1)
            ratio = x / scale
            x_grad = torch.where((ratio >= low).logical_and_(ratio <= high), grad, 0.0)
            slope = (grad * rounded).addcmul_(x_grad, x, value=-1).sum(1, keepdim=True)
        else:
            x_grad, slope = done
        log_grad = None
        if ctx.needs_input_grad[1]:  # slope is s · ∂L/∂s
            factor = table.factors if index is None else table.factors.index_select(0, index)
            constant = factor / (chosen.view(-1, 1).square() * math.sqrt(x.shape[1]))
            log_grad = slope.mul_(constant).view(chosen.shape)
        return layout.join(x_grad, weight), log_grad, None, None, None, None


def round_weight(
    weight: Tensor, log_scale: Tensor, scale: Tensor, chosen: Tensor, choice: Tensor | None, layout: Layout
) -> Tensor:
    """Rounds a weight with a scale and a codebook for every unit; NaN stays NaN.

    Args:
        weight: Floating point, as the layout says; its gradient is straight-through.
        log_scale: What is learned, a number a unit: it only receives the gradient described above.
        scale: The scales in use, float32 of the same shape, none of them zero.
        chosen: Those that were chosen from data, the same.
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
        shared = math.sqrt(max(1, x.numel() // max(1, len(x))))  # the features of a sample share the scale
        if offset is None and (done := _pass_samples(x, grad, rounded, scale, ctx.format)) is not None:
            x_grad, slope = done
            constant = family_table(ctx.format, x.device).factors[0] / (chosen.square() * shared)
            return x_grad, slope.mul_(constant) if ctx.needs_input_grad[1] else None, None, None, None, None, None
        book = catalogue.family(ctx.format).books[0]
        s, b, o = float(scale), float(chosen), 0.0 if offset is None else float(offset)
        low, high = sorted(np.float32(level * s + o) for level in (book.levels[0], book.levels[-1]))
        # It keeps what is strictly between its bounds.
        below, above = float(np.nextafter(low, -np.inf)), float(np.nextafter(high, np.inf))
        x_grad = torch.ops.aten.hardtanh_backward(grad, x, below, above)
        log_grad = shift_grad = None
        clipped = float(grad.sum(dtype=torch.float32) - x_grad.sum(dtype=torch.float32)) if offset is not None else 0.0
        if ctx.needs_input_grad[1]:
            slope = _dot(grad, rounded) - _dot(x_grad, x) - o * clipped  # s · ∂L/∂s
            log_grad = (slope * (learning_factor(book) / b / b / shared)).view(1)
        if ctx.needs_input_grad[2]:
            # A step is the unit of the shift, as it is of the gradient's factor: hence one spacing more.
            shift_grad = torch.full_like(scale, clipped * learning_factor(book) * spacing(book) / b / shared)
        return x_grad, log_grad, shift_grad, None, None, None, None


def _pass_samples(x: Tensor, grad: Tensor, rounded: Tensor, scale: Tensor, format: str) -> tuple[Tensor, Tensor] | None:
    """``pass_through`` for an input of one scale, and the sum over all; None where it would copy."""
    plain = x.dtype == torch.float32 and x.ndim > 1 and x.is_contiguous() and grad.is_contiguous()
    if not plain or x.numel() == 0 or not _callable_directly(grad):
        return None
    rows = len(x)
    x2, grad2, rounded2 = (tensor.view(rows, -1) for tensor in (x, grad, rounded))
    done = codes.pass_through(x2, grad2, rounded2, scale.view(1, 1), family_table(format, x.device).ends, None)
    return None if done is None else (done[0].view(x.shape), done[1].sum(0))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())


def round_input(
    x: Tensor,
    log_scale: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    chosen: Tensor,
    offset: Tensor | None,
    format: str,
) -> Tensor:
    """Rounds an input that has one scale, and maybe an offset; NaN stays NaN.

    Args:
        x: Floating point of any shape, samples first; its gradient is straight-through.
        log_scale: What is learned, float32 of shape (1,): it only receives the gradient described above.
        shift: The same for the offset, or None.
        scale: The scale in use, float32 of shape (1,).
        chosen: The one that was chosen from data, the same.
        offset: The offset in use, float32 of shape (1,), or None.
        format: Name of a single format.

    Returns:
        Of the shape and type of ``x``.
    """
    rounded = _RoundInput.apply(x, log_scale, shift, scale, chosen, offset, format)  # type: ignore[no-untyped-call]
    return cast(Tensor, rounded)
