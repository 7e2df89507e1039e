"""Coordinate descent: no step raises the error of the outputs, and bookkeeping stays exact."""

from itertools import pairwise

import pytest
import torch
from correlated_inputs import LAYOUTS, correlated, matrix

from dybit.ptq.rounding.descent import descend
from dybit.ptq.rounding.elements import Elements
from dybit.tensors.quantized_tensor import TensorSpec
from dybit.tensors.scale_search import choose_scales


def rounded(spec, parts):
    """A weight rounded to the nearest, and Hessians."""
    weight = matrix(12, 70)
    scales = choose_scales(
        weight,
        spec.formats,
        granularity=spec.granularity,
        group_size=spec.group_size,
        scale_type=spec.scale,
        choice_granularity=spec.choice,
    )
    elements = Elements(weight, spec, scales, parts)
    for column in range(70):
        elements.round(column, elements.weight[:, column])
    return weight, elements, correlated(70, parts)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("scale", ["fp32", "bf16", "pow2", "e4m3"])
def test_the_error_only_falls(layout, scale):
    parts = 3 if scale == "bf16" else 1
    spec = TensorSpec("dybit4spare", (12, 70), scale=scale, **layout)
    weight, elements, hessian = rounded(spec, parts)
    losses = [elements.loss(hessian)]
    for refit in (False, True, True):
        descend(elements, hessian, refit=refit)
        losses.append(elements.loss(hessian))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
    assert losses[1] < 0.7 * losses[0]
    # What is stored is what was kept in mind.
    values = elements.packed().dequantize()
    assert torch.allclose(weight - values, elements.rows(elements.error), atol=1e-5)


def test_scales_alone():
    spec = TensorSpec("s4r2", (12, 70))
    _, elements, hessian = rounded(spec, 1)
    elements.scales.scale.mul_(1.3)
    elements.scale.mul_(1.3)
    for column in range(70):
        elements.round(column, elements.weight[:, column])
    before = elements.scales.scale.clone()
    descend(elements, hessian, refit=False)
    assert torch.equal(elements.scales.scale, before)
    descend(elements, hessian, refit=True)
    # At the least-squares scale the error is orthogonal to what is rounded to, but for a last step of the codes.
    level = elements.tables.levels[elements.place]
    slope = (level * torch.bmm(hessian, elements.error)).sum(1)
    curvature = (level * torch.bmm(hessian, level)).sum(1)
    assert float((slope / curvature / elements.scale[:, 0]).abs().max()) < 1e-3


def test_inputs_that_were_always_zero_move_nothing():
    spec = TensorSpec("nf4", (12, 70))
    _, elements, hessian = rounded(spec, 1)
    places, scales = elements.place.clone(), elements.scales.scale.clone()
    descend(elements, torch.zeros_like(hessian))
    assert torch.equal(elements.place, places) and torch.equal(elements.scales.scale, scales)
