"""Pooling of channels-last images against torch in float64: every instruction set the same bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import on_all
from torch.nn import functional

from kernels import ISAS

pytestmark = [
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(not ISAS, reason="no compiled kernels"),
]
exact = settings(derandomize=True, deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)


def images(rng, spare=(0, 0)):
    """Random images [n, h, w, c], with unused channels and pixels between them."""
    n, c = int(rng.integers(1, 4)), int(rng.choice([1, 3, 16, 17, 64, 100, 150]))
    h, w = (int(size) for size in rng.integers(8, 20, 2))
    x = rng.standard_normal((n, h, w + spare[0], c + spare[1])).astype(np.float32)
    return torch.from_numpy(x)[:, :, :w, :c]


def pooled(function, x, outputs, *arguments):
    """function of the extension on every instruction set, [n, h, w, c]."""

    def call(extension):
        n, h, w, c = x.shape
        whole = torch.zeros(n, outputs[0] + 1, outputs[1], c + 1)
        y = whole[:, : outputs[0], :, :c]
        places = [(t.data_ptr(), t.stride()[:3]) for t in (x, y)]
        getattr(extension, function)([n, c, h, w, *outputs], *places, *arguments, 2)
        assert not whole[:, outputs[0] :].any() and not whole[..., c:].any()
        return y, torch.signbit(y) & ~y.isnan()

    return torch.from_numpy(on_all(call)[0])


def windows(rng):
    """Kernel, stride and padding of height and width."""
    kernel = rng.integers(1, 5, 2)
    return [tuple(map(int, pair)) for pair in (kernel, rng.integers(1, 4, 2), rng.integers(0, kernel // 2 + 1))]


def expected_max(x, *arguments):
    return functional.max_pool2d(x.permute(0, 3, 1, 2).contiguous(), *arguments).permute(0, 2, 3, 1)


@exact
@given(seeds, st.booleans())
def test_max_is_that_of_torch(seed, ceil_mode):
    rng = np.random.default_rng(seed)
    x, window = images(rng, rng.integers(0, 3, 2)), windows(rng)
    if rng.integers(2):
        bad = torch.tensor([np.nan, np.inf, -np.inf, -3e38])
        x[torch.from_numpy(rng.random(tuple(x.shape)) < 0.1)] = bad[int(rng.integers(4))]
    dilation = (int(rng.integers(1, 3)), 1)
    expected = expected_max(x, *window, dilation, ceil_mode)
    found = pooled("max_pool", x, expected.shape[1:3], [*window, dilation])
    np.testing.assert_array_equal(found, expected)


@exact
@given(seeds, st.booleans(), st.booleans(), st.sampled_from([None, 3]))
def test_average_is_close_to_float64(seed, ceil_mode, count_include_pad, divisor):
    rng = np.random.default_rng(seed)
    x, window = images(rng, rng.integers(0, 3, 2)), windows(rng)
    channels_first = x.double().permute(0, 3, 1, 2)
    expected = functional.avg_pool2d(channels_first, *window, ceil_mode, count_include_pad, divisor).permute(0, 2, 3, 1)
    found = pooled("average_pool", x, expected.shape[1:3], window, count_include_pad, divisor or 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@exact
@given(seeds)
def test_adaptive_average_is_close_to_float64(seed):
    rng = np.random.default_rng(seed)
    x = images(rng, rng.integers(0, 3, 2))
    outputs = [1, 1] if rng.integers(2) else [int(n) for n in rng.integers(1, 24, 2)]
    expected = functional.adaptive_avg_pool2d(x.double().permute(0, 3, 1, 2), outputs).permute(0, 2, 3, 1)
    found = pooled("adaptive_average_pool", x, outputs)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_mean_of_many_numbers_is_accurate():
    x = torch.from_numpy(np.random.default_rng(0).random((1, 150, 150, 5), dtype=np.float32)) + 100
    expected = x.double().mean((1, 2), keepdim=True)
    np.testing.assert_allclose(pooled("adaptive_average_pool", x, [1, 1]), expected, rtol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [3, 64])
def test_averages_with_nan_or_infinity_are_those_of_torch(bad, channels):
    x = torch.zeros(1, 4, 4, channels)
    x[0, 1, 1, channels - 1] = bad
    expected = x.double().permute(0, 3, 1, 2).mean((2, 3)).float()
    np.testing.assert_array_equal(pooled("adaptive_average_pool", x, [1, 1])[:, 0, 0], expected)
    window = [(2, 2), (2, 2), (0, 0)]
    expected = functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(pooled("average_pool", x, [2, 2], window, False, 0), expected)


def test_no_outputs():
    x = torch.zeros(0, 4, 4, 3)
    assert pooled("adaptive_average_pool", x, [1, 1]).shape == (0, 1, 1, 3)
