"""A packed weight at hand: what a linear layer keeps between its calls.

A product of a few rows, or of many by a small matrix, takes the kernels little more time than
Python needs to look up what was packed, so that lookup is done once, and each call only checks that it still holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from dybit.kernels import extension
from dybit.operators import packed_weight
from dybit.operators.linear import _packed, _unwatched
from dybit.operators.packed_weight import PackedWeight, Product
from dybit.tensors.quantized_tensor import QuantizedTensor

_SUFFIXES = ("", "_scale", "_choice", "_tensor_scale")


class Ready:
    """A weight packed for the inputs of one layer.

    Args:
        weight: The weight.
        input_format: As for :func:`dybit.operators.linear.linear`.
        reach: Likewise.
        input_group_size: Likewise.
    """

    __slots__ = ("_columns", "_isa", "_most", "_packed", "_parts", "_reach", "_rows", "_versions")

    def __init__(
        self,
        weight: QuantizedTensor,
        input_format: str = "",
        reach: float = 1.0,
        input_group_size: int = 0,
    ) -> None:
        self._parts = weight.packed, weight.scale, weight.choice, weight.tensor_scale
        # Tensors made in inference mode have no version; nor can they be written to outside of it.
        self._versions = [(part, part._version) for part in self._parts if part is not None and not part.is_inference()]
        self._isa = extension.isa()
        self._packed = _packed(weight, input_format, input_group_size)
        self._rows, self._columns, self._reach = weight.spec.rows, weight.spec.columns, reach
        self._most = self._packed.most_rows if self._packed else 0

    def fits(self, buffers: Mapping[str, Tensor | None], name: str = "weight") -> bool:
        """Whether the buffers are those that were packed, not written to since, and packed for what runs now."""
        for part, suffix in zip(self._parts, _SUFFIXES, strict=True):
            if buffers.get(name + suffix) is not part:
                return False
        for part, version in self._versions:
            if part._version != version:
                return False
        return self._isa == extension.isa()

    def multiply(
        self,
        x: Tensor,
        bias: Tensor | None,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
        activation: str = "",
    ) -> Tensor | None:
        """What :func:`dybit.operators.linear.linear` gives, or None where it has to be asked.

        Args:
            x: Of any shape, type and device.
            bias: Of shape (rows,), or None.
            scale: The static scale of the inputs, or None.
            offset: Their static offset, or None.
            activation: What follows, one of :data:`dybit.operators.packed_weight.ACTIVATIONS`.
        """
        if not self.takes(x, bias):
            return None
        y = cast(PackedWeight, self._packed).linear(
            x.view(-1, self._columns), bias, scale, offset, self._reach, activation
        )
        return y.view(*x.shape[:-1], self._rows)

    def takes(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the kernels can be asked for a product of ``x``, and nobody watches."""
        return (
            x.dtype is torch.float32
            and x.is_cpu
            and x.is_contiguous()
            and x.shape[-1:] == (self._columns,)
            and self._allows(x.numel() // self._columns, bias)
            and _unwatched(x, bias)
        )

    def _allows(self, rows: int, bias: Tensor | None) -> bool:
        return (
            self._packed is not None
            and rows <= self._most
            and (bias is None or (bias.dtype is torch.float32 and bias.is_contiguous() and bias.is_cpu))
        )


# A weight at hand, the bias beside it, and the static scale and offset of its inputs.
Operands = tuple[Ready, Tensor | None, Tensor | None, Tensor | None]


def feed_forward(x: Tensor, first: Operands, down: Operands, second: Operands | None, activation: str) -> Tensor | None:
    """What :func:`dybit.operators.packed_weight.feed_forward` gives, or None where the kernels cannot be asked.

    Args:
        x: Of any shape, type and device.
        first: What the activation follows.
        down: The last product.
        second: A factor, or None.
        activation: One of :data:`dybit.operators.packed_weight.ACTIVATIONS`.
    """
    ready, others = first[0], (down,) if second is None else (second, down)
    rows = x.numel() // ready._columns
    if not ready.takes(x, first[1]):
        return None
    for other, bias, *_ in others:
        if not other._allows(rows, bias) or (bias is not None and bias.requires_grad and torch.is_grad_enabled()):
            return None
    products = [
        Product(cast(PackedWeight, ready._packed), bias, scale, offset, ready._reach)
        for ready, bias, scale, offset in (first, *others)
    ]
    factor = None if second is None else products[1]
    y = packed_weight.feed_forward(x.view(rows, ready._columns), products[0], products[-1], factor, activation)
    return y.view(*x.shape[:-1], down[0]._rows)
