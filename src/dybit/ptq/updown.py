"""Chooses among neighbouring codes the ones with the least error of a layer's outputs.

Must not know layers or models. With the weights w, the second moments H of inputs and C of wanted outputs with inputs,
the squared error of a row's output is w·H·wᵀ - 2·w·Cᵀ + constant. Given scales, every weight chooses between the two
values next to it, as in AdaRound (Nagel et al., "Up or Down?", ICML 2020). Instead of relaxing the choice and
descending gradients, the choices are made one column after the other, each exact given all others, until none changes:
coordinate descent (Behdin et al., "QuantEase", 2023), for all rows at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dybit.ops import lookup, spans
from dybit.tensor import QuantizedTensor, TensorSpec

_BLOCK = 64  # columns between two updates of all gradients


def spread_units(units: Tensor, spec: TensorSpec) -> Tensor:
    """The scale or choice of every element: a view or tensor that broadcasts to (rows, columns)."""
    if units.shape[1] == 1:
        return units
    parts, column = [], 0
    for _, groups, length in spans(spec.columns, spec.group_size):
        parts.append(units[:, column : column + groups].repeat_interleave(length, dim=1))
        column += groups
    return torch.cat(parts, dim=1)


def neighbours(matrix: Tensor, weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """The two levels next to every weight at its scale: the largest not above it and the next, float32.

    Beyond the last level, the last two.
    """
    spec = weight.spec
    ratio = matrix / spread_units(weight.scales(), spec)
    choices = weight.choices()
    choice = None if choices is None else spread_units(choices, spec).expand(ratio.shape)
    low, high = torch.empty_like(ratio), torch.empty_like(ratio)
    for index, book in enumerate(spec.formats.books):
        levels = lookup(book, ratio.device).levels
        mask = slice(None) if choice is None else choice == index
        above = torch.bucketize(ratio[mask], levels, right=True).clamp(1, len(levels) - 1)
        low[mask], high[mask] = levels[above - 1], levels[above]
    return low, high


def descend(current: Tensor, other: Tensor, second: Tensor, gradient: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Flips weights between two values as long as the error falls.

    Args:
        current: Values, float32 of shape (groups, rows, columns); changed in place.
        other: The alternatives; changed in place.
        second: Second moments of the inputs, (groups, columns, columns).
        gradient: Half the error's gradient, (groups, rows, columns); changed in place.
        sweeps: At most so many rounds.

    Returns:
        Values and gradient.
    """
    columns = current.shape[2]
    curvature = second.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        flips = 0
        for start in range(0, columns, _BLOCK):
            part = slice(start, min(start + _BLOCK, columns))
            local, square = gradient[:, :, part].clone(), second[:, part, part]
            step = other[:, :, part] - current[:, :, part]
            done = torch.zeros_like(step)
            for j in range(step.shape[2]):
                delta = step[:, :, j]
                gain = delta * (2 * local[:, :, j] + curvature[:, start + j, None] * delta)
                delta = torch.where(gain < 0, delta, 0.0)
                local += delta[:, :, None] * square[:, j, None, :]
                done[:, :, j] = delta
            flips += int(torch.count_nonzero(done))
            gradient += done @ second[:, part]
            moved = done != 0
            old = current[:, :, part].clone()
            current[:, :, part] = torch.where(moved, other[:, :, part], old)
            other[:, :, part] = torch.where(moved, old, other[:, :, part])
        if not flips:
            break
    return current, gradient
