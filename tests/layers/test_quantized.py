"""Quantized layers as modules: state dicts, types, and what can be assigned."""

import copy
import pickle

import pytest
import torch
from helpers import build, inputs
from quantized_models import RECIPES, RECURRENT, each_layer, quantized
from torch import nn

from dybit.errors import DyBitError
from dybit.layers.quantized import quantized_layers
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

pytestmark = pytest.mark.usefixtures("plain_torch")


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_to_another_type_keeps_the_codes(name, dtype):
    model = quantized(name, RECIPES["w3_groups"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = {
        (key, k): layer.quantized_tensor(k).dequantize()
        for key, layer in quantized_layers(model).items()
        for k in layer.weight_specs
    }
    model.to(dtype)
    for layer in quantized_layers(model).values():
        assert layer.float_dtype == dtype
        for key in layer.weight_specs:
            assert getattr(layer, key).dtype == dtype
    arguments = [x.to(dtype) if x.is_floating_point() else x for x in inputs(name)]
    assert model(*arguments).dtype == dtype
    model.float()
    for key, layer in quantized_layers(model).items():
        for k in layer.weight_specs:
            assert torch.equal(getattr(layer, k), weights[key, k])
            for suffix in layer.weight_specs[k].buffers():
                stored = f"{key}.{k}{suffix}".removeprefix(".")
                assert torch.equal(model.state_dict()[stored].float(), before[stored].float())
    half = copy.deepcopy(model).half()
    assert half(*[x.half() if x.is_floating_point() else x for x in inputs(name)]).dtype == torch.float16


@each_layer
@pytest.mark.parametrize("recipe", [RECIPES["w4"], RECIPES["w3_groups"]], ids=["channel", "group"])
def test_state_dict_does_not_load_into_the_floating_point_model(name, recipe):
    state = quantized(name, recipe).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(name).load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(name).load_state_dict(state, strict=False, assign=True)


@each_layer
@torch.no_grad()
def test_state_dict_loads_into_a_quantized_model(name):
    first = quantized(name, RECIPES["w8a8"])
    other = build(name, seed=3)
    quantize_(other, RECIPES["w8a8"], [inputs(name, seed) for seed in (5, 6)])
    if {k: v.shape for k, v in first.state_dict().items()} != {k: v.shape for k, v in other.state_dict().items()}:
        return
    other.load_state_dict(first.state_dict())
    for key, value in first.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@each_layer
def test_describes_itself(name):
    model = quantized(name, RECIPES["w8a8_static"])
    text = repr(model)
    if name == "transformers_conv1d":  # which has a __repr__ of its own
        return
    assert "weight=dybit8plain/channel" in text
    if not name.startswith(("embedding", "bag")):
        assert ("/dynamic" if name.startswith(RECURRENT) else "/static") in text


def test_codes_are_not_replaced_by_values():
    layer = quantized("linear", Recipe(weights=4))
    before, weight = layer(torch.ones(1, 19)), layer.weight
    layer.weight = weight  # as whoever ties weights does: the same values
    assert layer._buffers["weight"].dtype == torch.uint8
    for value in (torch.ones(6, 19), weight.half(), torch.zeros(6, 1, 3, dtype=torch.uint8)):
        with pytest.raises(DyBitError, match="weight of a quantized layer cannot be replaced by a torch"):
            layer.weight = value
    with pytest.raises(DyBitError, match="out_features of a quantized layer cannot be changed to 7"):
        layer.out_features = 7
    layer.out_features = 6
    assert torch.equal(layer(torch.ones(1, 19)), before)
    layer.weight = torch.zeros_like(layer._buffers["weight"])
    assert not torch.equal(layer(torch.ones(1, 19)), before)


def test_the_weight_of_a_quantized_layer_cannot_be_trained():
    for layer in (nn.Linear(4, 3), nn.Embedding(5, 4), nn.Conv2d(2, 3, 3)):
        quantize_(layer, Recipe(weights=4, embeddings=4))
        copied = copy.deepcopy(layer)
        copied.requires_grad_(False)
        with pytest.raises(DyBitError, match="cannot be trained; call dequantize_ on the layer"):
            for parameter in copied.parameters():  # as PEFT does with modules_to_save
                parameter.requires_grad_(True)
        assert {tuple(p.shape) for p in layer.parameters()} >= {tuple(layer.weight.shape)}


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Conv2d(3, 4, 3)])
def test_parametrizations_of_a_quantized_layer_are_refused(layer):
    quantize_(layer, Recipe(weights=4))
    before, cls = {key: value.clone() for key, value in layer.state_dict().items()}, type(layer)
    with pytest.raises(DyBitError, match="weight of a quantized layer cannot be"):
        nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(DyBitError, match="weight of a quantized layer cannot be"):
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(DyBitError, match=r"cannot be changed by aten\.set_, as parametrizations do"):
        nn.utils.parametrizations.spectral_norm(layer)
    with (
        pytest.raises(DyBitError, match="weight of a quantized layer cannot be parametrized"),
        pytest.warns(FutureWarning),
    ):
        nn.utils.weight_norm(layer)
    with pytest.raises(DyBitError, match="weight of a quantized layer cannot be replaced by None"):
        layer.weight = None
    with pytest.raises(DyBitError, match="weight of a quantized layer cannot be pruned"):
        nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    assert type(layer) is cls and not hasattr(layer, "parametrizations")
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items() if "extra" not in key)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", ["pruned", "parametrized"])
def test_changed_biases_are_added(change, when, activations):
    for layer, x in ((nn.Linear(8, 6), torch.randn(4, 8)), (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5))):
        nn.init.constant_(layer.bias, 100.0)

        def alter(layer=layer):
            if change == "pruned":
                nn.utils.prune.l1_unstructured(layer, "bias", 2)
            else:
                nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())

        if when == "before":
            alter()
        quantize_(layer, Recipe(weights=8, activations=activations), [x])
        if when == "after":
            alter()
        dim = 1 if layer.weight.ndim > 2 else -1
        means = layer(x).transpose(dim, -1).flatten(0, -2).mean(0)
        assert torch.allclose(means, layer.bias, atol=5.0)


@pytest.mark.parametrize("activations", [None, 8])
def test_copies_after_a_forward_with_a_parametrized_bias(activations):
    layer = quantize_(nn.Linear(8, 6), Recipe(weights=4, activations=activations, activation_mode="dynamic"))
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    x = torch.randn(2, 8)
    expected = layer(x)
    assert expected.requires_grad
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    with pytest.raises(DyBitError, match="ParametrizedQuantizedLinear cannot be pickled"):
        pickle.dumps(layer)
