"""Sizes of convolutions, and convolutions in torch, against torch's own on padded inputs."""

import pytest
import torch
from convolutions import FUNCTIONS, geometries
from hypothesis import given, settings
from torch.nn import functional

from dybit.errors import DyBitError
from dybit.operators.conv_geometry import ConvGeometry


@settings(max_examples=60)
@given(geometries())
def test_convolutions_of_padded_inputs(case):
    x_shape, shape, stride, padding, dilation, groups = case
    geometry = ConvGeometry.of(list(stride), list(padding), list(dilation), groups)
    assert geometry == ConvGeometry(stride, padding, dilation, groups) and hash(geometry) is not None
    x, weight, bias = torch.randn(x_shape, requires_grad=True), torch.randn(shape), torch.randn(shape[0])
    last_first = [n for i in range(len(padding) - 2, -1, -2) for n in padding[i : i + 2]]
    padded = functional.pad(x, last_first)
    expected = FUNCTIONS[len(stride)](padded, weight, bias, stride, 0, dilation, groups)
    found = geometry.convolve(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert geometry.output_size(x_shape[0], x_shape[2:], shape[2:]) == [*expected.shape[2:]]
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    torch.testing.assert_close(geometry.input_gradient(upstream, x_shape, weight), x.grad, rtol=1e-4, atol=1e-4)


def test_extents_are_of_three_dimensions():
    geometry = ConvGeometry((2, 3), (1, 2, 3, 4), (5, 6))
    assert geometry.extents((7, 8)) == [(1, 7, 8), (1, 2, 3), (1, 5, 6), (0, 1, 3), (0, 2, 4)]


@pytest.mark.parametrize(
    ("size", "message"), [((2, 9), "x must be at least as large as the kernel"), ((0, 9), "at least as large")]
)
def test_what_does_not_fit(size, message):
    with pytest.raises(DyBitError, match=message):
        ConvGeometry((1, 1), (0,) * 4, (1, 1)).output_size(1, size, (3, 3))
    with pytest.raises(DyBitError, match=r"x must have no empty dimension besides the batch, but has size \[0, 9\]"):
        ConvGeometry((1, 1), (2,) * 4, (1, 1)).output_size(1, (0, 9), (3, 3))
    assert ConvGeometry((1, 1), (2,) * 4, (1, 1)).output_size(0, (0, 9), (3, 3)) == [2, 11]
