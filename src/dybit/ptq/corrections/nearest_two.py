"""Chooses, of the two values next to every weight, the one with the least error of the layer's outputs.

With the second moments H of a layer's inputs and C of
its wanted outputs with its inputs, the squared error of an output with the weights w is w·H·wᵀ - 2·w·Cᵀ + constant.
Given scales, every weight may take one of the two values next to it, as in AdaRound (Nagel et al., "Up or Down?
Adaptive Rounding for Post-Training Quantization", ICML 2020). Instead of relaxing these choices and descending
gradients, they are made one column after the other, each exactly given all others, for all rows at once, until none
changes: coordinate descent, which needs the moments only and takes seconds where the relaxation takes minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dybit.kernels.lookup import lookup
from dybit.tensors.encoding import unit_rows
from dybit.tensors.quantized_tensor import QuantizedTensor

_BLOCK = 64  # columns between two updates of all gradients


@dataclass
class Candidates:
    """The two levels next to every weight, and which of them it has: all float32 of shape (rows, columns).

    Attributes:
        now: The level that it has.
        other: The other one.
        share: Where the weight lies between the lower (0) and the upper level (1).
        scale: The scale.
    """

    now: Tensor
    other: Tensor
    share: Tensor
    scale: Tensor

    @classmethod
    def of(cls, matrix: Tensor, weight: QuantizedTensor) -> Candidates:
        """Finds the levels next to a floating-point weight at the scales of its quantized form.

        A weight beyond the last level has the last two. Of a weight whose code is neither of its neighbours, as other
        algorithms may leave it, the neighbour nearest to the code is taken.

        Args:
            matrix: float32 of shape (rows, columns).
            weight: Its quantized form.
        """
        spec = weight.spec
        scale = unit_rows(weight.scales(), spec).expand(matrix.shape)
        ratio, current = matrix / scale, spec.to_matrix(weight.dequantize()) / scale
        choices = weight.choices()
        choice = scale.new_zeros(1, 1) if choices is None else unit_rows(choices, spec)
        choice = choice.expand(matrix.shape)
        low, high = torch.empty_like(ratio), torch.empty_like(ratio)
        for index, book in enumerate(spec.formats.books):
            levels, mask = lookup(book, ratio.device).levels, choice == index
            above = torch.bucketize(ratio[mask], levels, right=True).clamp(1, len(levels) - 1)
            low[mask], high[mask] = levels[above - 1], levels[above]
        up = (current - low).abs() > (current - high).abs()
        share = ((ratio - low) / (high - low)).clamp(0, 1)
        return cls(torch.where(up, high, low), torch.where(up, low, high), share, scale)

    def flip(self, where: Tensor) -> None:
        """Exchanges the levels of some elements."""
        self.now, self.other = torch.where(where, self.other, self.now), torch.where(where, self.now, self.other)


def descend(step: Tensor, second: Tensor, gradient: Tensor, sweeps: int) -> Tensor:
    """Decides which elements take their other value, so that the error falls at every decision.

    Args:
        step: The other value less the present one, float32 of shape (groups, rows, columns).
        second: Second moments of the inputs of every group of rows, (groups, columns, columns), symmetric.
        gradient: Half the gradient of the error, w·H - C, (groups, rows, columns); kept up to date in place.
        sweeps: At most so many rounds over all columns.

    Returns:
        Which elements to exchange: bool of shape (groups, rows, columns).
    """
    step = step.clone()
    flipped = torch.zeros_like(step, dtype=torch.bool)
    curvature = second.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        changed = False
        for start in range(0, step.shape[2], _BLOCK):
            part = slice(start, start + _BLOCK)
            local, square, steps = gradient[:, :, part].clone(), second[:, part, part], step[:, :, part]
            taken = torch.zeros_like(steps)
            for j in range(steps.shape[2]):
                delta = steps[:, :, j]
                gain = delta * (2 * local[:, :, j] + curvature[:, start + j, None] * delta)
                taken[:, :, j] = torch.where(gain < 0, delta, 0.0)
                local += taken[:, :, j, None] * square[:, j, None, :]
            moved = taken != 0
            if bool(moved.any()):
                changed = True
                gradient += taken @ second[:, part]
                flipped[:, :, part] ^= moved
                step[:, :, part] = torch.where(moved, -steps, steps)
        if not changed:
            break
    return flipped
