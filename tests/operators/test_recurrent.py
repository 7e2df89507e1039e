"""All steps of a recurrent layer in one call: against torch step by step, and every instruction set the same bits."""

import pytest
import torch

from dybit.kernels import extension
from dybit.operators.input_rounding import KEPT, InputRounding
from dybit.operators.linear import linear
from dybit.operators.recurrent import CELLS, recur_steps, recur_whole
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec
from kernels import ISAS

pytestmark = [
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(not ISAS, reason="no compiled kernels"),
]
ROUNDINGS = {
    "kept": KEPT,
    "int8": InputRounding("int8", reach=127.0),
    "groups": InputRounding("s8r2", None, None, 2.0, 16),
}


def next_states(cell, x, own, states):
    """The definition of torch.nn.LSTM, GRU and RNN, from the products of inputs and states."""
    h = states[0]
    if cell == "LSTM":
        i, f, g, o = (x + own).chunk(4, 1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return [o.sigmoid() * c.tanh(), c]
    if cell == "GRU":
        (r, z, n), (own_r, own_z, own_n) = x.chunk(3, 1), own.chunk(3, 1)
        update, new = (z + own_z).sigmoid(), (n + (r + own_r).sigmoid() * own_n).tanh()
        return [(1 - update) * new + update * h]
    return [(x + own).tanh() if cell == "RNN_TANH" else (x + own).relu()]


def by_steps(cell, x, counts, states, multiply, reverse):
    order = range(len(counts))
    starts, outputs, states = [sum(counts[:t]) for t in order], {}, [s.clone() for s in states]
    for t in reversed(order) if reverse else order:
        some = slice(0, counts[t])
        new = next_states(
            cell, x[starts[t] : starts[t] + counts[t]], multiply(states[0][some]), [s[some] for s in states]
        )
        for state, value in zip(states, new, strict=True):
            state[some] = value
        outputs[t] = new[0]
    return torch.cat([outputs[t] for t in order]), states


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
@torch.no_grad()
def test_as_step_by_step(cell, name, reverse):
    torch.manual_seed(0)
    size, counts, rounding = 37, [3, 3, 2, 1], ROUNDINGS[name]
    gates = {"LSTM": 4, "GRU": 3}.get(cell, 1)
    weight = quantize(torch.randn(gates * size, size) / 6, TensorSpec("dybit4", (gates * size, size)))
    bias = torch.randn(gates * size) if reverse else None
    x, states = torch.randn(sum(counts), gates * size), [torch.randn(3, size) for _ in range(1 + (cell == "LSTM"))]
    results = []
    for isa in ISAS:
        extension.use(isa)
        before = [state.clone() for state in states]
        found = recur_steps(cell, x, counts, states, weight, bias, rounding, reverse)
        assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))
        if found is None:  # the scalar kernels leave several unrounded rows to torch
            assert isa == "scalar" and name == "kept"
            continue
        expected = by_steps(cell, x, counts, states, lambda h: linear(h, weight, bias, rounding), reverse)
        tight = {"rtol": 1e-4, "atol": 1e-4 if name == "kept" else 2e-2}  # a code may flip
        torch.testing.assert_close(found[0], expected[0], **tight)
        torch.testing.assert_close(found[1], expected[1], **tight)
        results.append([found[0], *found[1]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_what_is_left_to_torch():
    weight = quantize(torch.randn(8, 8), TensorSpec("dybit4", (8, 8)))
    x, h = torch.randn(2, 8), torch.zeros(1, 8)
    rounding = ROUNDINGS["int8"]
    assert recur_steps("RNN_TANH", x, [1, 1], [h], weight, None, rounding) is not None
    assert recur_steps("RNN_TANH", x.double(), [1, 1], [h.double()], weight, None, rounding) is None
    assert recur_steps("RNN_TANH", x.requires_grad_(), [1, 1], [h], weight, None, rounding) is None
    assert recur_steps("RNN_TANH", x.detach()[:0], [0], [h[:0]], weight, None, rounding) is None


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
@torch.no_grad()
def test_one_operator_for_sequences_of_one_length(cell, name, reverse):
    torch.manual_seed(0)
    gates, rounding = {"LSTM": 4, "GRU": 3}.get(cell, 1), ROUNDINGS[name]
    shape = gates * 32, 32
    bias, states = torch.randn(shape[0]), [torch.randn(3, 32) for _ in range(2 if cell == "LSTM" else 1)]
    x = torch.randn(5, 3, shape[0])
    for family, exact in (("dybit4", True), ("nf4", False)):  # the kernels do not have the latter
        weight = quantize(torch.randn(shape) / 8, TensorSpec(family, shape))
        counts = [3] * 5
        y, last = recur_whole(cell, x, states, weight, bias, rounding, reverse)
        if exact:
            expected, final = recur_steps(cell, x.flatten(0, 1), counts, states, weight, bias, rounding, reverse)
        else:
            multiply = lambda h: linear(h, weight, bias, rounding)  # noqa: B023, E731
            expected, final = by_steps(cell, x.flatten(0, 1), counts, states, multiply, reverse)
        for one, other in zip((y.flatten(0, 1), *last), (expected, *final), strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=0.0 if exact else 1e-5)


def test_opcheck():
    weight = quantize(torch.randn(64, 16), TensorSpec("dybit4", (64, 16)))
    parts = weight.packed, weight.scale, weight.choice, weight.tensor_scale
    rest = weight.spec.key, "LSTM", "int8", 127.0, 0, False
    given = torch.randn(4, 2, 64), torch.randn(2, 16), torch.randn(2, 16), *parts, torch.randn(64), *rest
    torch.library.opcheck(torch.ops.dybit.recurrent, given)
