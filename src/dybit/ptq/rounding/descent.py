"""Coordinate descent on the codes and scales of one weight: every step lowers the squared error of the outputs.

With e = w - q of a row, its error is e H eᵀ. Given all other codes, the best q_j is the level nearest to
q_j + (H e)_j / H_jj; given all codes, the best scale of a unit solves a linear equation. Both steps are taken in turns,
column by column and unit by unit, all rows at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dybit.kernels.packed_codes import spans
from dybit.ptq.rounding.elements import Elements
from dybit.tensors.scale_types import scale_candidates

_BLOCK = 64  # columns brought up to date one by one; later ones by a matrix product a block


def descend(elements: Elements, hessian: Tensor, *, refit: bool = True) -> None:
    """Improves codes and scales in place by one round over all columns and units.

    Args:
        elements: The weight, rounded already.
        hessian: float32 of shape (parts, columns, columns), symmetric.
        refit: Whether scales may change.
    """
    columns = elements.weight.shape[1]
    gradient = torch.bmm(hessian, elements.error)  # H e, kept up to date
    units = spans(columns, elements.spec.group_size)
    index = 0
    for first, groups, length in units:
        for start in range(first, first + groups * length, length):
            stop = start + length
            for block in range(start, stop, _BLOCK):
                _descend_block(elements, hessian, gradient, block, min(block + _BLOCK, stop))
            if refit:
                _refit(elements, hessian, gradient, index, start, stop)
            index += 1


def _descend_block(elements: Elements, hessian: Tensor, gradient: Tensor, start: int, stop: int) -> None:
    """Moves the codes of some columns to the best ones, one column after the other."""
    before = elements.error[:, start:stop].clone()
    inside = gradient[:, start:stop].clone()
    smallest = torch.finfo(torch.float32).tiny
    for column in range(start, stop):
        old = elements.error[:, column].clone()
        curvature = hessian[:, column, column, None]
        # Where an input was always zero, nothing can be said: the code stays.
        step = torch.where(curvature > smallest, inside[:, column - start] / curvature.clamp(min=smallest), 0.0)
        error = elements.round(column, elements.weight[:, column] - old + step)
        if column + 1 < stop:
            later = hessian[:, column + 1 : stop, column, None]
            inside[:, column + 1 - start :].baddbmm_(later, (error - old)[:, None])
    gradient.baddbmm_(hessian[:, :, start:stop], elements.error[:, start:stop] - before)


def _refit(elements: Elements, hessian: Tensor, gradient: Tensor, unit: int, start: int, stop: int) -> None:
    """Moves the scales of one group of columns towards their least-squares values, as far as their type can."""
    scales, spec = elements.scales, elements.spec
    table = scales.scale if spec.granularity == "group" else scales.scale[:, :1]
    level = elements.tables.levels[elements.place[:, start:stop]]
    pull = (level * gradient[:, start:stop]).sum(1)
    weight = (level * torch.bmm(hessian[:, start:stop, start:stop], level)).sum(1)
    if spec.granularity == "tensor":
        pull, weight = pull.sum().expand(1, 1), weight.sum().expand(1, 1)
    old = table[:, unit].reshape(pull.shape).clone()
    best = torch.where(weight > 0, old + pull / weight, old)
    best = torch.where(torch.isfinite(best) & (best * old > 0), best, old)
    new = old
    for candidate in scale_candidates(best, spec.scale, scales.tensor_scale):
        new = torch.where((candidate - best).abs() < (new - best).abs(), candidate, new)
    table[:, unit] = new.reshape(-1)
    change = (old - new)[:, None] * level
    elements.scale[:, start:stop] = new[:, None]
    elements.error[:, start:stop] = torch.addcmul(elements.weight[:, start:stop], level, new[:, None], value=-1)
    gradient.baddbmm_(hessian[:, :, start:stop], change)
