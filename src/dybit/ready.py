"""A packed weight at hand: what a linear layer keeps between its calls.

Must not know layers. A product of a few rows, or of many by a small matrix, takes the kernels little more time than
Python needs to look up what was packed, so that lookup is done once, and each call only checks that it still holds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from dybit import kernels
from dybit.linear import _packed, _unwatched
from dybit.tensor import QuantizedTensor

_MOST_ROWS = 4  # of inputs that are not rounded; the product with more is done otherwise
_SUFFIXES = ("", "_scale", "_choice", "_tensor_scale")


class Ready:
    """A weight packed for the inputs of one layer.

    Args:
        weight: The weight.
        input_format: As for :func:`dybit.linear.linear`.
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
        self._isa = kernels.isa()
        self._packed = _packed(weight, input_format, input_group_size)
        self._rows, self._columns, self._reach = weight.spec.rows, weight.spec.columns, reach
        self._most = sys.maxsize if input_format else _MOST_ROWS * self._columns  # elements

    def fits(self, buffers: Mapping[str, Tensor | None], name: str = "weight") -> bool:
        """Whether the buffers are those that were packed, not written to since, and packed for what runs now."""
        for part, suffix in zip(self._parts, _SUFFIXES, strict=True):
            if buffers.get(name + suffix) is not part:
                return False
        for part, version in self._versions:
            if part._version != version:
                return False
        return self._isa == kernels.isa()

    def multiply(
        self,
        x: Tensor,
        bias: Tensor | None,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
        activation: str = "",
    ) -> Tensor | None:
        """What :func:`dybit.linear.linear` gives, or None where it has to be asked.

        Args:
            x: Of any shape, type and device.
            bias: Of shape (rows,), or None.
            scale: The static scale of the inputs, or None.
            offset: Their static offset, or None.
            activation: What follows, one of :data:`dybit.kernels.ACTIVATIONS`.
        """
        packed = self._packed
        if (
            packed is None
            or x.dtype is not torch.float32
            or not x.is_cpu
            or not x.is_contiguous()
            or x.shape[-1:] != (self._columns,)
            or x.numel() > self._most
            or not (bias is None or (bias.dtype is torch.float32 and bias.is_contiguous() and bias.is_cpu))
            or not _unwatched(x, bias)
        ):
            return None
        y = packed.linear(x.view(-1, self._columns), bias, scale, offset, self._reach, activation)
        return y.view(*x.shape[:-1], self._rows)
