"""What quantized layers compute, against plain torch with weights and inputs from the NumPy oracle, bit for bit."""

import copy

import pytest
import torch
from helpers import build, conv1d, decoder, inputs, oracle, rounded_input
from quantized_models import RECIPES, RECURRENT, each_layer, each_recipe, quantized
from torch import nn

from dybit.errors import DyBitWarning
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

pytestmark = pytest.mark.usefixtures("plain_torch")  # tests/operators are about the kernels


@each_layer
@each_recipe
@torch.no_grad()
def test_packed_equals_fake_quantized(name, recipe):
    model = quantized(name, recipe)
    if model is None:
        return
    reference = oracle(build(name), model)
    for seed in (1, 5):
        arguments = inputs(name, seed)
        expected, found = reference(*arguments), model(*arguments)
        if name.startswith(RECURRENT) and recipe.activations:  # another order of additions
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found, expected)
        assert bool(torch.isfinite(expected).all())


@each_layer
@torch.no_grad()
def test_eight_bits_are_close_to_floating_point(name):
    recipe = Recipe(weights=8, embeddings=8, activations=8, group_size=8)
    model, arguments = quantized(name, recipe), inputs(name, 5)
    expected = build(name)(*arguments)
    assert (model(*arguments) - expected).norm() < 0.03 * expected.norm()


def test_keyword_arguments():
    cases = [
        (nn.Linear(4, 3), {"input": torch.randn(2, 4)}),
        (nn.Conv2d(2, 3, 3), {"input": torch.randn(1, 2, 5, 5)}),
        (nn.ConvTranspose2d(2, 3, 3, stride=2), {"output_size": [12, 12], "input": torch.randn(1, 2, 5, 5)}),
        (conv1d(), {"x": torch.randn(2, 9)}),
        (nn.Embedding(5, 4), {"input": torch.tensor([1, 2])}),
    ]
    for module, arguments in cases:
        x = arguments.get("input", arguments.get("x"))
        extra = (arguments["output_size"],) if "output_size" in arguments else ()
        quantize_(module.eval(), Recipe(activations=8), [(x, *extra)])
        assert torch.equal(module(**arguments), module(x, *extra))


def test_keyword_arguments_of_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    twin = copy.deepcopy(attention)
    quantize_(attention, Recipe(weights=4, activations=8), [(q, k, v)])
    quantize_(twin, Recipe(weights=4, activations=8), [{"value": v, "key": k, "query": q}])
    expected = attention(q, k, v)[0]
    assert torch.equal(attention(value=v, key=k, query=q)[0], expected)
    assert torch.equal(attention(q, value=v, key=k)[0], expected)
    assert torch.equal(twin(q, k, v)[0], expected)


class Scaled(nn.Linear):
    """Its first argument is no tensor."""

    def forward(self, factor, x):
        return super().forward(x) * factor


class OwnAttention(nn.MultiheadAttention):
    """A forward of its own, with one argument."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Coordinates(nn.Conv2d):
    """Puts channels between its input and its weight."""

    def forward(self, x):
        return super().forward(torch.cat([x, x[:, :2]], dim=1))


@torch.no_grad()
def test_subclasses_with_a_forward_of_their_own():
    x = torch.randn(2, 4)
    model = quantize_(Scaled(4, 3).eval(), Recipe(weights=8, activations=8), [(2.0, x)])
    linear = nn.functional.linear(rounded_input(model, x), model.weight, model.bias)
    assert torch.equal(model(2.0, x), linear * 2.0)
    tokens = torch.randn(2, 5, 8)
    # Its output projection is never called, by nobody, so its input is kept.
    for recipe in (
        Recipe(weights=8),
        Recipe(weights=8, activations=8),
        Recipe(activations=8, activation_mode="dynamic"),
    ):
        attention = OwnAttention(8, 2, batch_first=True).eval()
        expected = attention(tokens)
        with pytest.warns(DyBitWarning, match="calibration never reached 1 layers, .*: out_proj"):
            quantize_(attention, recipe, [tokens])
        assert isinstance(attention, OwnAttention)
        assert 0 < (attention(tokens) - expected).norm() < 0.2 * expected.norm()
    image = torch.randn(2, 3, 6, 6)
    model = Coordinates(5, 4, 3).eval()
    expected = model(image)
    quantize_(model, Recipe(weights=8, activations=8), [image])
    assert (model(image) - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_nothing_to_look_up():
    for size in (None, 4):
        for width in (3, 4, 8):
            model = quantize_(nn.Embedding(10, 9), Recipe(embeddings=width, group_size=size))
            assert model(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 9)
            assert torch.equal(model(torch.tensor(4)), model.weight[4])
            with pytest.raises(IndexError):
                model(torch.tensor([10]))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (2, 0, 4)])
def test_empty_batches(shape):
    for mode in ("static", "dynamic"):
        model = quantize_(nn.Linear(4, 3), Recipe(weights=3, activations=4, activation_mode=mode), [torch.randn(8, 4)])
        assert model(torch.ones(shape)).shape == (*shape[:-1], 3)


@torch.no_grad()
def test_layouts_of_the_input_do_not_matter():
    x = torch.randn(2, 4, 6, 6)
    for mode in ("static", "dynamic"):
        conv = quantize_(nn.Conv2d(4, 4, 3).eval(), Recipe(weights=4, activations="nf4", activation_mode=mode), [x])
        assert torch.allclose(conv(x.to(memory_format=torch.channels_last)), conv(x), atol=1e-5)
        linear = quantize_(nn.Linear(6, 4).eval(), Recipe(activations="nf4", activation_mode=mode), [x])
        assert torch.equal(linear(x.transpose(1, 2)), linear(x.transpose(1, 2).contiguous()))


def test_gradients_reach_inputs_and_biases():
    x = torch.randn(3, 4, requires_grad=True)
    for mode in ("static", "dynamic"):
        model = quantize_(nn.Linear(4, 2), Recipe(activations=8, activation_mode=mode), [torch.randn(9, 4)])
        model(x).sum().backward()
        assert torch.equal(x.grad, model.weight.sum(0).expand(3, 4))
        assert model.bias.grad is not None
        x.grad = None


@pytest.fixture
def kernels(plain_torch, monkeypatch, request):
    """The compiled kernels again, unless the parameter says otherwise."""
    if getattr(request, "param", True):
        monkeypatch.undo()


@pytest.mark.parametrize("kernels", [True, False], indirect=True)
@pytest.mark.parametrize("recipe", ["w4", "w8a8", "w4a8_dynamic"])
@each_layer
def test_outputs_can_be_modified_in_place(name, recipe, kernels):
    model = quantized(name, RECIPES[recipe])
    arguments = [x.requires_grad_() if x.is_floating_point() else x for x in inputs(name)]
    expected = model(*arguments)
    y = model(*arguments)
    y *= 2.0
    nn.functional.relu(y, inplace=True)
    assert torch.equal(y, nn.functional.relu(expected * 2.0))
    assert y.requires_grad or name.startswith(("embedding", "bag"))
    if y.requires_grad:
        y.sum().backward()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_gradients_of_inputs_of_any_rank(dimensions, kernels):
    layer = quantize_(nn.Linear(4, 3), Recipe(weights=4))
    x = torch.randn((2, 5, 4)[-dimensions:], requires_grad=True)
    factor = torch.randn(*x.shape[:-1], 3)
    (layer(x) * factor).sum().backward()
    assert torch.allclose(x.grad, factor @ layer.weight)
    assert torch.allclose(layer.bias.grad, factor.reshape(-1, 3).sum(0))


@pytest.mark.parametrize("recipe", ["w4", "w4a8_dynamic"])
def test_outputs_of_experts_can_be_modified_in_place(recipe, kernels):
    model = decoder("Mixtral", num_local_experts=4, num_experts_per_tok=1)
    experts = quantize_(model, RECIPES[recipe]).model.layers[0].mlp.experts
    for count in (1, 2):
        x, weights = torch.randn(3, 48, requires_grad=True), torch.rand(3, count, requires_grad=True)
        y = experts(x, torch.randint(0, 4, (3, count)), weights)
        y *= 2.0
        nn.functional.relu(y, inplace=True).sum().backward()
        assert x.grad is not None
