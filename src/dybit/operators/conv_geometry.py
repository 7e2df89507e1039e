"""The geometry of a convolution: its sizes, and the convolution itself in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dybit.errors import DyBitError

_FUNCTIONS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}

Extents = list[tuple[int, ...]]  # kernel, stride, dilation, zeros before and after, each for three dimensions


@dataclass(frozen=True)
class ConvGeometry:
    """Stride, padding, dilation and groups of a convolution.

    Args:
        stride: Of every dimension.
        padding: Zeros before and after every dimension in turn: twice as many numbers.
        dilation: Of every dimension.
        groups: Groups of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def of(
        cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int = 1
    ) -> ConvGeometry:
        """Makes the geometry from any sequences."""
        return cls(tuple(stride), tuple(padding), tuple(dilation), groups)

    def extents(self, kernel: Sequence[int]) -> Extents:
        """Returns kernel, stride, dilation, zeros before and zeros after, each for three dimensions."""
        missing = 3 - len(kernel)
        ones, zeros = (1,) * missing, (0,) * missing
        return [
            (*ones, *kernel),
            (*ones, *self.stride),
            (*ones, *self.dilation),
            (*zeros, *self.padding[::2]),
            (*zeros, *self.padding[1::2]),
        ]

    def output_size(self, batch: int, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Returns the size of the result.

        Args:
            batch: Number of samples.
            size: Of a sample.
            kernel: Of the kernel.

        Raises:
            DyBitError: A sample is empty, or smaller than the kernel.
        """
        padded = [n + self.padding[2 * i] + self.padding[2 * i + 1] for i, n in enumerate(size)]
        reach = [dilation * (n - 1) + 1 for dilation, n in zip(self.dilation, kernel, strict=True)]
        if any(n < need for n, need in zip(padded, reach, strict=True)):
            raise DyBitError(
                f"x must be at least as large as the kernel, which covers {reach}, but is {padded} with padding"
            )
        if any(n == 0 for n in size) and batch != 0:
            raise DyBitError(f"x must have no empty dimension besides the batch, but has size {list(size)}")
        return [(n - need) // step + 1 for n, need, step in zip(padded, reach, self.stride, strict=True)]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        r"""Convolves in plain torch.

        Args:
            x: Of shape (batch, channels, \*size).
            weight: Of shape (out_channels, channels / groups, \*kernel).
            bias: Of shape (out_channels,), or None.
        """
        before, after = list(self.padding[::2]), list(self.padding[1::2])
        if before != after:
            pairs = [self.padding[i : i + 2] for i in range(0, len(self.padding), 2)]
            x = torch.nn.functional.pad(x, [n for pair in reversed(pairs) for n in pair])  # the last dimension first
            before = [0] * len(before)
        function = cast(Any, _FUNCTIONS[weight.ndim - 2])
        return cast(Tensor, function(x, weight, bias, self.stride, before, self.dilation, self.groups))

    def input_gradient(self, grad: Tensor, shape: Sequence[int], weight: Tensor) -> Tensor:
        """Returns the gradient of an input of a given shape from the gradient of the result."""
        sizes = [n + self.padding[2 * i] + self.padding[2 * i + 1] for i, n in enumerate(shape[2:])]
        padded = grad.new_empty(1).expand(*shape[:2], *sizes)  # only its shape is used
        zeros, wanted = [0] * len(sizes), [True, False, False]
        x_grad: Tensor = torch.ops.aten.convolution_backward(
            grad, padded, weight, None, self.stride, zeros, self.dilation, False, zeros, self.groups, wanted
        )[0]
        for i, n in enumerate(shape[2:]):
            x_grad = x_grad.narrow(i + 2, self.padding[2 * i], n)
        return x_grad
