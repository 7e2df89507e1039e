"""LayerNorm and RMSNorm against float64: within a few ulp, every instruction set the same bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import packed, rounded_memory
from rows import at, on_all, place, strided

from kernels import ISAS

pytestmark = [
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(not ISAS, reason="no compiled kernels"),
]
exact = settings(derandomize=True, deadline=None, max_examples=30)
NO_CONSUMER = (None, (0, 0, 1.0), 0)


def run(x, addend=None, weight=None, bias=None, eps=1e-5, root=False, shift=0.0, keep=False, consumer=NO_CONSUMER):
    """y, and the sums if they are kept."""

    def call(extension):
        y, total = torch.zeros(x.shape), torch.zeros(x.shape) if keep else None
        extension.norm(
            *x.shape, at(x), at(addend), at(total), place(weight), place(bias), eps, root, shift, at(y), *consumer, 2
        )
        return [y] if total is None else [y, total]

    return on_all(call)


def oracle(x, addend, weight, bias, eps, root, shift):
    """The norm in float64, and the size to which its error is compared: that of the terms, and half a deviation."""
    x = (x if addend is None else x + addend).numpy().astype(np.float64)
    centred = x if root else x - x.mean(1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(1, keepdims=True) + np.float64(np.float32(eps)))
    weight = 1.0 if weight is None else (weight.numpy() + np.float32(shift)).astype(np.float64)
    bias = 0.0 if bias is None else bias.numpy()
    return y * weight + bias, (np.abs(y) + 0.5) * np.abs(weight) + np.abs(bias)


@exact
@given(st.integers(0, 2**32 - 1))
def test_close_to_float64(seed):
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.choice([0, 1, 3, 20])), int(rng.choice([1, 2, 15, 16, 63, 64, 65, 100, 384, 1000, 4097]))
    x = strided(rng, rows, columns, int(rng.integers(3)), 10.0 ** rng.integers(-3, 4))
    x += float(rng.choice([0, 1, -300])) * x.abs().amax() if rows else 0
    addend = strided(rng, rows, columns, 1) if rng.integers(2) else None
    weight, bias = (strided(rng, 1, columns)[0] if rng.integers(2) else None for _ in range(2))
    eps, root = float(rng.choice([1e-5, 1e-12])), bool(rng.integers(2))
    shift, keep = float(rng.integers(2)) if weight is not None else 0.0, bool(rng.integers(2))
    y, *total = run(x, addend, weight, bias, eps, root, shift, keep)
    expected, size = oracle(x, addend, weight, bias, eps, root, shift)
    assert (np.abs(y - expected) <= 3e-7 * size).all()
    if keep:
        np.testing.assert_array_equal(total[0], x if addend is None else x + addend)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_with_nan_or_infinity_are_those_of_torch(root, bad):
    x = strided(np.random.default_rng(0), 3, 70)
    x[1, 66] = bad
    (y,) = run(x, root=root)
    norm = torch.nn.functional.rms_norm if root else torch.nn.functional.layer_norm
    expected = norm(x, (70,), eps=1e-5)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected.numpy()))
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_constant_rows_give_the_bias():
    bias = strided(np.random.default_rng(0), 1, 50)[0]
    for value in (0.0, 1e-30, 0.1, 3e7, 1e30):
        (y,) = run(torch.full((2, 50), value), bias=bias, eps=0.001)
        np.testing.assert_allclose(y, bias.expand(2, 50), atol=1e-6)


def test_sums_in_place_of_an_operand():
    rng = np.random.default_rng(0)
    x, addend = strided(rng, 5, 70), strided(rng, 5, 70)

    def call(extension):
        first, second = x.clone(), addend.clone()
        extension.norm(5, 70, at(first), at(second), at(second), 0, 0, 1e-5, False, 0.0, at(first), *NO_CONSUMER, 1)
        return first, second

    found, expected = on_all(call), run(x, addend, keep=True)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@exact
@given(st.integers(0, 2**32 - 1), st.sampled_from(["s8r1", "u8r1", "s8"]), st.booleans())
def test_results_are_rounded_for_a_layer(seed, inputs, keep):
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.choice([1, 3, 100])), int(rng.integers(1, 150))
    x = strided(rng, rows, columns, 1)
    scale, group_size = torch.tensor([0.02]) if rng.integers(2) else None, int(rng.choice([0, 32]))

    def call(extension):
        weight = packed(np.random.default_rng(0), 5, columns, inputs, input_group_size=group_size)
        y, kept = torch.zeros(x.shape), torch.zeros(x.shape)
        mine, theirs = rounded_memory(weight, rows), rounded_memory(weight, rows)
        given_scale = (place(scale), 0, 1.5)
        extension.norm(
            rows,
            columns,
            at(x),
            (0, 0),
            (0, 0),
            0,
            0,
            1e-5,
            False,
            0.0,
            at(kept) if keep else (0, 0),
            weight.compiled,
            given_scale,
            place(mine),
            2,
        )
        extension.norm(rows, columns, at(x), (0, 0), (0, 0), 0, 0, 1e-5, False, 0.0, at(y), *NO_CONSUMER, 2)
        weight.compiled.round(*at(y), rows, given_scale, place(theirs), 2)
        assert not keep or torch.equal(y, kept)
        out = torch.zeros(2, rows, 5)
        for memory, result in zip((mine, theirs), out, strict=True):
            weight.compiled.multiply(place(memory), rows, 0, 0, 0, (0, 0), (0, 0), at(result), 1)
        return out

    mine, theirs = on_all(call)
    np.testing.assert_array_equal(mine, theirs)
