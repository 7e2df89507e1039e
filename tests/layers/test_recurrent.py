"""Recurrent layers written out, against torch's own; and quantized with the kernels, against a computation in NumPy."""

import copy
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent import Sequence, reference
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import dybit
from dybit.errors import DyBitError
from dybit.layers.quantized import quantized_layers
from dybit.layers.recurrent import recur, recur_once
from dybit.models.calibration import calibrate
from dybit.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")  # torch, of its own speed


def multiply_by(module):
    def multiply(x, weight, bias):
        return nn.functional.linear(x, getattr(module, weight), getattr(module, bias, None) if bias else None)

    return multiply


def flat(found):
    """The tensors in a result of a recurrent layer."""
    if isinstance(found, PackedSequence):
        return [found.data]
    return [found] if isinstance(found, torch.Tensor) else [x for part in found if part is not None for x in flat(part)]


@st.composite
def layers(draw):
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    if kind is nn.LSTM and draw(st.booleans()):
        options["proj_size"] = 2
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    return kind(3, 5, **options)


def sequences(shape):
    if shape == "packed":
        return pack_sequence([torch.randn(n, 3) for n in (2, 5, 1, 5)], enforce_sorted=False)
    return torch.randn({"batch": (2, 4, 3), "alone": (4, 3), "empty": (2, 0, 3), "step": (1, 1, 3)}[shape])


@settings(max_examples=60)
@given(layers(), st.sampled_from(["packed", "batch", "alone", "step"]), st.booleans())
def test_written_out_as_torch_computes(module, shape, with_state):
    x = sequences(shape)
    expected = module(x)
    states = None
    if with_state:
        states = tuple(torch.randn_like(h) for h in flat(expected)[1:])
        states = states if len(states) > 1 else states[0]
        expected = module(x, states)
    found = recur(module, x, states, multiply=multiply_by(module))
    torch.testing.assert_close(flat(found), flat(expected))
    if shape == "packed":
        assert all(torch.equal(a, b) for a, b in zip(found[0][1:], expected[0][1:], strict=True))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_batch_of_none_and_bad_arguments(kind):
    module = kind(3, 5)
    multiply = multiply_by(module)
    assert [tuple(x.shape) for x in flat(recur(module, sequences("empty"), multiply=multiply))] == [
        tuple(x.shape) for x in flat(module(sequences("empty")))
    ]
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        recur(module, torch.zeros(0, 2, 3), multiply=multiply)
    bad = torch.zeros(1, 3, 5)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        recur(module, torch.zeros(4, 2, 3), (bad, bad) if kind is nn.LSTM else bad, multiply=multiply)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_cells_as_torch_computes(kind, shape):
    cell, x = kind(3, 5), torch.randn(shape)
    state = cell(x)
    multiply = multiply_by(cell)
    torch.testing.assert_close(flat(recur_once(cell, x, multiply=multiply)), flat(state))
    torch.testing.assert_close(flat(recur_once(cell, x, state, multiply=multiply)), flat(cell(x, state)))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("size", [(2, 3), (3,)])
@pytest.mark.parametrize("state", [(1, 5), (5,), (1, 1), (1, 2, 5), (2, 1)])
def test_states_of_another_shape_are_refused_as_by_torch(kind, size, state):
    if state == (5,) and size == (3,):
        return
    cell, x, hx = kind(3, 5), torch.randn(size), torch.randn(state)
    hx = (hx, hx) if kind is nn.LSTMCell else hx
    with pytest.raises((RuntimeError, ValueError)):
        cell(x, hx)
    with pytest.raises(DyBitError, match="hx must have shape"):
        recur_once(cell, x, hx, multiply=multiply_by(cell))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_arguments_of_another_kind_are_refused_as_by_torch(kind):
    module = kind(3, 5)
    state = torch.zeros(1, 2, 5)
    cases = {
        "hx must be": (torch.zeros(4, 2, 3), state if kind is nn.LSTM else (state,)),
        "input must have 2 or 3 dimensions": (torch.zeros(4, 2, 2, 3), None),
    }
    for message, arguments in cases.items():
        with pytest.raises((RuntimeError, ValueError, AttributeError, IndexError)):
            module(*arguments)
        with pytest.raises(DyBitError, match=message):
            recur(module, *arguments, multiply=multiply_by(module))


class Own(nn.LSTM):
    """A layer with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, Own])
@pytest.mark.parametrize("recipe", [{}, {"activations": 8}, {"activations": 4, "activation_group_size": 4}])
@torch.no_grad()
def test_quantized_with_the_kernels(kind, recipe, tmp_path):
    """Against a computation from the dequantized weights, and after all that keeps a model."""
    mode = {"activation_mode": "dynamic"} if "activation_group_size" in recipe else {}
    make = lambda: nn.ModuleList([kind(24, 32, num_layers=2, bidirectional=kind is not Own)]).eval()  # noqa: E731
    model, x = make(), torch.randn(3, 2, 24)
    model.forward = lambda x: model[0](x)
    before = sum(t.numel() for t in model.parameters() if t.ndim > 1)
    dybit.quantize_(model, Recipe(weights=4, group_size=8, **recipe, **mode), [x] if recipe else None, strict=True)
    del model.forward
    layer = model[0]
    assert not [name for name, p in model.named_parameters() if p.ndim > 1]
    assert sum(spec.rows * spec.columns for spec in layer.weight_specs.values()) == before
    assert (layer.input_spec is not None) == bool(recipe) and (
        not recipe or layer.input_spec.mode == "dynamic" or kind is Own
    )
    floating = dybit.dequantize_(copy.deepcopy(model))[0]
    assert type(floating) is kind
    round_input = (lambda x: x) if kind is Own else layer.round_input
    given_ = layer.round_input(x) if kind is Own else x
    expected = reference(floating, given_, round_input=round_input)[0] * (2 if kind is Own else 1)
    found = flat(layer(x))[0]
    # A code of a state may flip where sums differ by their order.
    assert (found - expected).norm() < (1e-5 if not recipe else 1e-2) * expected.norm()
    loaded = dybit.load(dybit.save(model, tmp_path / "q"), make())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(flat(twin[0](x))[0], found)
    layer.double()
    assert flat(layer(x.double()))[0].dtype == torch.float64
    layer.float()
    assert torch.equal(flat(layer(x))[0], found)


def test_floating_point_weights_are_let_go():
    module = nn.LSTM(8, 8)
    kept = [weakref.ref(p) for p in module.parameters() if p.ndim > 1]
    dybit.quantize_(module, Recipe())
    assert all(ref() is None for ref in kept)


def test_gradients_reach_the_input_and_biases():
    module = dybit.quantize_(nn.GRU(8, 8), Recipe(weights=4))
    floating = dybit.dequantize_(copy.deepcopy(module))
    found = []
    for layer in (module, floating):
        x = torch.ones(3, 2, 8, requires_grad=True)
        layer(x)[0].square().sum().backward()
        found.append([x.grad, layer.bias_hh_l0.grad])
    torch.testing.assert_close(*found)


def test_trained_after_it_is_dequantized():
    """Torch keeps a list of the weights, which must be those of the module."""
    module = dybit.dequantize_(dybit.quantize_(nn.LSTM(4, 4), Recipe()))
    before = module(torch.ones(2, 1, 4))[0]
    with torch.no_grad():
        module.weight_ih_l0.zero_()
    assert not torch.equal(module(torch.ones(2, 1, 4))[0], before)
    assert torch.equal(copy.deepcopy(module)(torch.ones(2, 1, 4))[0], module(torch.ones(2, 1, 4))[0])


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
@pytest.mark.parametrize("change", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_normed_weights(change):
    module = nn.LSTM(6, 7)
    change(module, "weight_hh_l0")
    x = torch.randn(3, 2, 6)
    expected = module(x)[0]
    dybit.quantize_(module, Recipe(weights=8))
    assert not parametrize.is_parametrized(module)
    assert (module(x)[0] - expected).norm() < 0.02 * expected.norm()


def test_training_learns_what_is_converted():
    torch.manual_seed(0)
    x, goal = torch.randn(6, 8, 6), torch.randn(6, 8, 7).tanh()
    for recipe in (Recipe(weights=3), Recipe(weights=4, activations=8, activation_mode="dynamic")):
        model = dybit.prepare_qat_(Sequence(nn.LSTM), recipe)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        losses = []
        for _ in range(30):
            loss = (model(x) - goal).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        model.eval()
        expected = model(x)
        found = dybit.convert_(model)(x)
        assert (found - expected).norm() < 1e-2 * expected.norm()


def test_packed_sequences_are_calibrated():
    model = Sequence(nn.LSTM, packed=True)
    seen = calibrate(model, {"layer": model.layer}, [torch.randn(4, 3, 6)])["layer"]
    assert seen.seen and seen.counts[0] == 1 + 2 + 3
    layer = dybit.quantize_(model, Recipe(weights=4, activations=8), [torch.randn(4, 3, 6)], algorithm="gptq").layer
    assert layer.input_spec is not None and len(quantized_layers(model)) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_compiles():
    model = dybit.quantize_(Sequence(nn.LSTM), Recipe(weights=4)).eval()
    x = torch.randn(3, 2, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=1e-4, atol=1e-5)
