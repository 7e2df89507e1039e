"""Functions of numbers and pairs, and softmax, against torch in float64: every instruction set the same bits."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import packed, rounded_memory
from rows import at, on_all, place, strided
from torch.nn import functional

from kernels import ISAS

pytestmark = [
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(not ISAS, reason="no compiled kernels"),
]
exact = settings(derandomize=True, deadline=None, max_examples=30)
# By number: the function, and its error. Absolute errors are of results near ±1 or of the size of x.
UNARY = {
    "relu": (torch.relu, 0, 0),
    "neg": (torch.neg, 0, 0),
    "abs": (torch.abs, 0, 0),
    "sqrt": (torch.sqrt, 6e-8, 0),
    "rsqrt": (torch.rsqrt, 2e-7, 0),
    "exp": (torch.exp, 2e-7, 1e-45),
    "sigmoid": (torch.sigmoid, 3e-7, 1e-38),
    "tanh": (torch.tanh, 4e-7, 1e-45),
    "silu": (functional.silu, 3e-7, 1e-7),
    "gelu": (functional.gelu, 3e-7, 1e-7),
    "gelu_tanh": (lambda x: functional.gelu(x, approximate="tanh"), 3e-7, 2e-7),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), 3e-7, 1e-7),
    "hardsigmoid": (functional.hardsigmoid, 3e-7, 2e-7),
    "hardswish": (functional.hardswish, 3e-7, 4e-7),
}
BINARY = [torch.add, torch.sub, torch.mul, torch.div]
SPECIAL = [0.0, -0.0, 1e-41, -1e-38, 5e37, -5e37, 88.7, 89.5, -87.5, -103.5, -150.0, 1e-4, -1e-4, 10.0, -3.0, 6.0]
UNBOUNDED = [np.inf, -np.inf, np.nan]


def signs(y):
    return torch.signbit(y) & ~y.isnan()


def unary(name, x):
    """The result, out of place and in place, of every instruction set."""

    def call(extension):
        y, same = torch.zeros_like(x), x.clone()
        for source, target in ((x, y), (same, same)):
            extension.unary(list(UNARY).index(name), place(source), x.numel(), place(target), 2)
        np.testing.assert_array_equal(y, same)
        return y, signs(y)

    return torch.from_numpy(on_all(call)[0])


@pytest.mark.parametrize("name", UNARY)
@exact
@given(st.integers(0, 2**32 - 1))
def test_unary_is_close_to_float64(name, seed):
    rng = np.random.default_rng(seed)
    x = strided(rng, 1, int(rng.choice([0, 1, 15, 16, 17, 100, 1025, 70000])), 0, float(rng.choice([0.1, 1, 5, 40])))[0]
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)[: len(x)]
    x = x[torch.from_numpy(rng.permutation(len(x)))].contiguous()
    function, relative, absolute = UNARY[name]
    found, expected = unary(name, x), function(x.double())
    expected = torch.where(expected > 3.4028236e38, torch.inf, expected)
    torch.testing.assert_close(found.double(), expected, rtol=relative, atol=absolute, equal_nan=True)


@pytest.mark.parametrize("name", UNARY)
def test_unary_of_nan_infinities_and_zeros_is_that_of_torch(name):
    x = torch.tensor([*UNBOUNDED, 0.0, -0.0] * 9)
    found, expected = unary(name, x), UNARY[name][0](x.double()).float()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(signs(found)[expected != 0], signs(expected)[expected != 0])


def test_signs_of_zeros():
    x = torch.tensor([0.0, -0.0])
    for name, expected in (("neg", [True, False]), ("abs", [False, False]), ("tanh", [False, True])):
        assert signs(unary(name, x)).tolist() == expected


@pytest.mark.parametrize(
    ("name", "activation"), [("relu", 1), ("gelu", 2), ("gelu_tanh", 3), ("silu", 4), ("quick_gelu", 5)]
)
def test_activations_are_those_of_a_linear_layer(name, activation):
    """The layer's inputs are zero and its bias is x, so its product is x."""
    x = torch.cat([strided(np.random.default_rng(0), 1, 500, 0, 4)[0], torch.tensor(UNBOUNDED + SPECIAL)])
    zeros, scale = torch.zeros(1, 32), torch.ones(1)

    def call(extension):
        layer = packed(np.random.default_rng(0), len(x), 32)
        y, memory = torch.zeros(1, len(x)), rounded_memory(layer, 1)
        layer.compiled.round(*at(zeros), 1, (place(scale), 0, 1.0), place(memory), 1)
        layer.compiled.multiply(place(memory), 1, 0, place(x), activation, (0, 0), (0, 0), at(y), 1)
        return [y[0]]

    np.testing.assert_array_equal(unary(name, x), on_all(call)[0])


@exact
@given(st.integers(0, 2**32 - 1))
def test_clamp(seed):
    rng = np.random.default_rng(seed)
    x = strided(rng, 1, int(rng.choice([0, 1, 16, 33, 70000])), 0, 3)[0].contiguous()
    x[:5] = torch.tensor([*UNBOUNDED, 0.0, -0.0])[: len(x)]
    low, high = (float(rng.choice([-np.inf, -1, 0, 2])), float(rng.choice([np.inf, 6, 1, -1])))

    def call(extension):
        y, same = torch.zeros_like(x), x.clone()
        extension.clamp(place(x), len(x), low, high, place(y), 2)
        extension.clamp(place(same), len(x), low, high, place(same), 2)
        np.testing.assert_array_equal(y, same)
        return y, signs(y)

    np.testing.assert_array_equal(on_all(call)[0], x.clamp(low, high))


def operand(rng, sizes):
    """An array of the sizes, each dimension of its own stride or broadcast, and its strides."""
    kept = [size if rng.integers(3) else 1 for size in sizes]
    spare = [int(rng.integers(3)), int(rng.integers(2)), 0] if rng.integers(2) else [0, 0, 0]
    whole = strided(rng, 1, prod(k + s for k, s in zip(kept, spare, strict=True)))[0]
    x = whole.reshape([k + s for k, s in zip(kept, spare, strict=True)])[: kept[0], : kept[1]]
    return x.expand(sizes)


def spread(x):
    return x.data_ptr(), x.stride()


@exact
@given(st.integers(0, 2**32 - 1), st.sampled_from(range(len(BINARY))))
def test_binary_is_that_of_torch(seed, kind):
    rng = np.random.default_rng(seed)
    small = [[1, 2, 5], [1, 3, 7], [1, 4, 16, 33, 100]]
    sizes = [int(rng.choice(c)) for c in (small if rng.integers(4) else [[1, 2], [1, 3], [1, 40000, 100000]])]
    a, b = operand(rng, sizes), operand(rng, sizes)

    def call(extension):
        memory = torch.zeros(sizes[0], sizes[1] + 1, sizes[2])
        y = memory[:, : sizes[1]]
        extension.binary(kind, sizes, spread(a), spread(b), spread(y), 2)
        assert not memory[:, sizes[1] :].any()
        in_place, other = (x.clone(memory_format=torch.contiguous_format) for x in (a, b))
        extension.binary(kind, sizes, spread(in_place), spread(other), spread(in_place), 1)
        np.testing.assert_array_equal(in_place, y)
        return y, signs(y)

    np.testing.assert_array_equal(on_all(call)[0], BINARY[kind](a, b))


@pytest.mark.parametrize("kind", range(len(BINARY)))
def test_binary_of_special_values_is_that_of_torch(kind):
    values = torch.tensor(UNBOUNDED + SPECIAL)
    a, b = values[None, :, None], values[None, None]
    sizes = [1, len(values), len(values)]

    def call(extension):
        y = torch.zeros(sizes)
        extension.binary(kind, sizes, spread(a.expand(sizes)), spread(b.expand(sizes)), spread(y), 1)
        return y, signs(y)

    expected = BINARY[kind](a, b)
    found, sign = on_all(call)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(sign, signs(expected))


def softmax(x):
    def call(extension):
        y, same = torch.zeros_like(x), x.clone()
        extension.softmax(place(x), *x.shape, place(y), 2)
        extension.softmax(place(same), *x.shape, place(same), 2)
        np.testing.assert_array_equal(y, same)
        return [y]

    return on_all(call)[0]


@exact
@given(st.integers(0, 2**32 - 1))
def test_softmax_is_close_to_float64(seed):
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.choice([0, 1, 3, 100])), int(rng.choice([1, 2, 15, 16, 17, 100, 1000, 1025, 5000]))
    x = strided(rng, rows, columns, 0, float(rng.choice([0.1, 1, 10, 100]))).contiguous()
    x += float(rng.choice([0, -300, 300]))
    expected = x.double().softmax(1)
    distance = x.amax(1, keepdim=True) - x  # rounded to FP32, as is its product with log₂ e
    assert ((torch.from_numpy(softmax(x)) - expected).abs() <= (5e-7 + 1.4e-7 * distance) * expected + 1e-37).all()


@pytest.mark.parametrize("columns", [3, 40])
@pytest.mark.parametrize("place_of_bad", [0, -1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -3e38])
def test_softmax_of_rows_with_nan_or_infinity_is_that_of_torch(columns, place_of_bad, bad):
    x = strided(np.random.default_rng(0), 3, columns).contiguous()
    x[1, place_of_bad] = bad
    x[2] = -np.inf
    np.testing.assert_allclose(softmax(x), x.softmax(1), rtol=1e-6)
