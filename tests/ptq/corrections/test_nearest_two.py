import itertools

import pytest
import torch

from dybit.ptq.corrections.nearest_two import Candidates, descend
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec


def test_descent_against_all_choices():
    """Never above where it began, at a point that no single flip improves, and at times the best of all 2^8 choices."""
    best = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
        second = (x.T @ x / 40)[None]
        target, low = torch.randn(1, 1, 8, generator=generator), torch.full((1, 1, 8), -1.0)
        cross, step = target @ second, torch.full((1, 1, 8), 2.0)

        def cost(w, second=second, cross=cross):
            return float((w @ second * w).sum() - 2 * (w * cross).sum())

        gradient = low @ second - cross
        flipped = descend(step, second, gradient, 50)
        found = low + flipped * step
        assert torch.allclose(gradient, found @ second - cross, atol=1e-3)
        for j in range(8):
            other = found.clone()
            other[..., j] *= -1
            assert cost(other) >= cost(found) - 1e-4
        choices = [cost(torch.tensor(c)[None, None]) for c in itertools.product((-1.0, 1.0), repeat=8)]
        assert cost(found) <= cost(low) + 1e-5
        best += cost(found) <= min(choices) + 1e-4
    assert best >= 5


@pytest.mark.parametrize("columns", [5, 64, 150])
def test_blocks_make_no_difference(columns):
    x = torch.randn(300, columns)
    second, step = (x.T @ x / 300)[None], torch.randn(1, 7, columns)
    gradient = torch.randn(1, 7, columns)
    start = gradient.clone()
    flipped = descend(step, second, gradient, 1)
    expected, running = torch.zeros_like(flipped), start.clone()
    for j in range(columns):
        gain = step[:, :, j] * (2 * running[:, :, j] + second[0, j, j] * step[:, :, j])
        expected[:, :, j] = gain < 0
        running += (expected[:, :, j] * step[:, :, j])[..., None] * second[0, j]
    assert (flipped != expected).float().mean() < 0.01  # but for ties of rounding errors
    assert torch.allclose(start + (flipped * step) @ second, gradient, atol=1e-3)


@pytest.mark.parametrize("family", ["dybit4spare", "dybit2mid", "nf4", "e2m1"])
def test_candidates_enclose_the_weight(family):
    matrix = torch.randn(6, 20)
    weight = quantize(matrix, TensorSpec(family, (6, 20)))
    found = Candidates.of(matrix, weight)
    assert torch.allclose(found.now * found.scale, weight.dequantize(), atol=1e-6)
    low, high = torch.minimum(found.now, found.other), torch.maximum(found.now, found.other)
    ratio = matrix / found.scale
    inside = (found.share > 0) & (found.share < 1)
    assert bool((low <= ratio)[inside].all()) and bool((ratio <= high)[inside].all())
    assert torch.allclose((low + found.share * (high - low))[inside], ratio[inside], atol=1e-5)
