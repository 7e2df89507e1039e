"""Linear layers in two halves: inputs rounded once for several layers, and results finished in the cache."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import packed, rounded_memory
from rows import at, place, strided

from dybit.kernels import extension
from dybit.operators.activations import ACTIVATIONS
from dybit.operators.input_rounding import InputRounding
from kernels import ISAS

pytestmark = [
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(not ISAS, reason="no compiled kernels"),
]
exact = settings(derandomize=True, deadline=None, max_examples=25)


def rounded(weight, x, scale=(0, 0, 1.0), threads=2):
    memory = rounded_memory(weight, len(x))
    weight.compiled.round(*at(x), len(x), scale, place(memory), threads)
    return memory


def finished(weight, x, memory, *, offset=0, bias=None, activation="", factor=None, addend=None, spare=0):
    y = torch.full((len(x), weight.shape[0] + spare), 7.0)
    weight.compiled.multiply(
        place(memory),
        len(x),
        offset,
        place(bias),
        ACTIVATIONS.index(activation),
        at(factor),
        at(addend),
        at(y),
        2,
    )
    assert (y[:, weight.shape[0] :] == 7).all()
    return y[:, : weight.shape[0]]


@exact
@given(st.integers(0, 2**32 - 1), st.sampled_from(ISAS), st.sampled_from(["", "s8r1", "u8r1", "s8"]))
def test_two_halves_are_linear_with_what_follows(seed, isa, inputs):
    extension.use(isa)
    rng = np.random.default_rng(seed)
    m, n, k = int(rng.choice([0, 1, 2, 5, 33, 300])), int(rng.integers(1, 90)), int(rng.integers(1, 150))
    weight = packed(rng, n, k, inputs, [None, 32][rng.integers(2)])
    x, bias = strided(rng, m, k, int(rng.integers(3))), strided(rng, 1, n)[0] if rng.integers(2) else None
    activation = ACTIVATIONS[rng.integers(len(ACTIVATIONS))]
    factor, addend = (strided(rng, m, n, int(rng.integers(3))) if rng.integers(2) else None for _ in range(2))
    if m:
        x[rng.integers(m), rng.integers(k)] = np.nan
    offset = torch.tensor([0.25]) if rng.integers(2) else None
    scale = torch.tensor([0.02]) if offset is not None or rng.integers(2) else None
    given_scale = (place(scale), place(offset), 1.5)
    memory = rounded(weight, x, given_scale)
    found = finished(
        weight,
        x,
        memory,
        offset=given_scale[1],
        bias=bias,
        activation=activation,
        factor=factor,
        addend=addend,
        spare=int(rng.integers(3)),
    )
    rounding = InputRounding(inputs, scale=scale, offset=offset, reach=1.5)
    expected = weight.linear(x.contiguous(), bias, rounding, activation)
    expected = expected if factor is None else expected * factor
    expected = expected if addend is None else expected + addend
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


@pytest.mark.parametrize("isa", ISAS)
def test_rows_rounded_for_one_weight_serve_another(isa):
    extension.use(isa)
    rng = np.random.default_rng(0)
    first, second = (
        packed(rng, 40, 160, group_size=32, input_group_size=64),
        packed(rng, 7, 160, group_size=32, input_group_size=64),
    )
    assert first.compiled.shares_rows_with(second.compiled)
    x = strided(rng, 9, 160)
    memory = rounded(first, x)
    np.testing.assert_array_equal(
        finished(second, x, memory), second.linear(x, None, InputRounding("s8r1", group_size=64))
    )


@pytest.mark.parametrize(
    "other",
    [
        {"columns": 128},
        {"inputs": "u8r1"},
        {"inputs": "s8"},
        {"inputs": "s7r1"},
        {"inputs": ""},
        {"group_size": 80},
        {"input_group_size": 32},
    ],
    ids=str,
)
def test_weights_that_share_no_rows(other):
    rng = np.random.default_rng(0)
    plain = {"rows": 20, "columns": 160, "inputs": "s8r1", "group_size": 32}
    one, two = packed(rng, **plain).compiled, packed(rng, **plain | other).compiled
    assert one.shares_rows_with(one) and not one.shares_rows_with(two) and not two.shares_rows_with(one)
