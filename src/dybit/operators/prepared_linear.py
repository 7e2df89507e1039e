"""A linear layer prepared for many calls: it is packed once, and each call only checks that nothing has changed.

A small product takes the kernels little longer than Python needs to look up the packed weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dybit.operators import packed_weight
from dybit.operators.activations import activate
from dybit.operators.dispatch import unwatched
from dybit.operators.input_rounding import KEPT, InputRounding
from dybit.operators.linear import linear, packed_for
from dybit.operators.packed_cache import LayerSnapshot
from dybit.operators.packed_weight import Product
from dybit.tensors.quantized_tensor import QuantizedTensor


class PreparedLinear:
    """A weight packed for the inputs of one layer, with its bias.

    Args:
        weight: The weight.
        bias: Of shape (rows,), or None.
        rounding: How inputs are rounded.

    Attributes:
        snapshot: Of the tensors above.
    """

    __slots__ = ("_bias", "_columns", "_most", "_rounding", "_rows", "_weight", "product", "snapshot")

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None, rounding: InputRounding = KEPT) -> None:
        self._weight, self._bias, self._rounding = weight, bias, rounding
        self.snapshot = LayerSnapshot(weight, bias, rounding)
        self._rows, self._columns = weight.spec.rows, weight.spec.columns
        packed = packed_for(weight, rounding)
        known = bias is None or (bias.dtype is torch.float32 and bias.is_cpu and bias.is_contiguous())
        #: The product for the kernels; None if they do not support it.
        self.product = Product(packed, bias, rounding) if packed is not None and known else None
        self._most = 0 if packed is None else packed.most_rows

    def __deepcopy__(self, memo: object) -> None:
        """Returns None: a copy of the layer prepares its own. The bias may be computed, and then cannot be copied."""

    def multiply(self, x: Tensor, activation: str = "") -> Tensor:
        """Multiplies as :func:`dybit.operators.linear.linear` and applies an activation.

        If the kernels compute both, the activation is within 2e-7 of the exact function.

        Args:
            x: Floating point of shape (..., columns).
            activation: One of :data:`dybit.operators.activations.ACTIVATIONS`.

        Returns:
            Of shape (..., rows) and the type of ``x``.

        Raises:
            DyBitError: As for :func:`dybit.operators.linear.linear`, or the activation is unknown.
        """
        product = self.product
        if product is None or not self._takes(x):
            return activate(linear(x, self._weight, self._bias, self._rounding), activation)
        return product.of(x.view(-1, self._columns), activation).view(*x.shape[:-1], self._rows)

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernels can multiply ``x``, are not slower than torch, and the dispatcher can be bypassed."""
        return (
            unwatched(x, self._bias)  # first: while tracing, sizes are tensors
            and x.dtype is torch.float32
            and x.is_cpu
            and x.is_contiguous()
            and x.shape[-1:] == (self._columns,)
            and x.numel() <= self._most * self._columns
        )


def feed_forward(
    x: Tensor, first: PreparedLinear, down: PreparedLinear, second: PreparedLinear | None, activation: str
) -> Tensor:
    """Returns ``down(activation(first(x)) · second(x))``, or ``down(activation(first(x)))`` if ``second`` is None.

    Args:
        x: Floating point of shape (..., columns of ``first``).
        first: The product before the activation.
        down: The last product.
        second: The factor, or None.
        activation: One of :data:`dybit.operators.activations.ACTIVATIONS`.

    Returns:
        Of shape (..., rows of ``down``) and the type of ``x``.

    Raises:
        DyBitError: As for :func:`dybit.operators.linear.linear`, or the activation is unknown.
    """
    products = _products(x, first, *((second,) if second is not None else ()), down)
    if products is None:
        hidden = first.multiply(x, activation)
        if second is not None:
            hidden = hidden * second.multiply(x)
        return down.multiply(hidden)
    factor = None if second is None else products[1]
    rows = x.view(-1, products[0].weight.shape[1])
    y = packed_weight.feed_forward(rows, products[0], products[-1], factor, activation)
    return y.view(*x.shape[:-1], y.shape[-1])


def _products(x: Tensor, first: PreparedLinear, *others: PreparedLinear) -> list[Product] | None:
    """Returns the products that the kernels compute one after the other; None if they do not support them."""
    if first.product is None or not first._takes(x):
        return None
    rows, recorded = x.numel() // first._columns, torch.is_grad_enabled()
    products = [first.product]
    for other in others:
        learns = recorded and other._bias is not None and other._bias.requires_grad
        if other.product is None or rows > other._most or learns:
            return None
        products.append(other.product)
    return products
