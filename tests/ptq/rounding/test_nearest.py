"""Rounding to the nearest, layer by layer, against quantizing the weights by themselves."""

import pytest
import torch
from torch import nn

from dybit.layers.quantized import quantized_layers
from dybit.models.calibration import calibrate
from dybit.models.plan import plan_layers
from dybit.ptq.rounding.nearest import layer_input, rtn_, weight_spec
from dybit.recipe import Recipe
from dybit.tensors.encoding import quantize


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8, bias=False)).eval()


@pytest.mark.parametrize(
    "fields", [{"weights": 4}, {"weights": 3, "group_size": 8, "scale": "bf16"}, {"weights": "nf4"}]
)
def test_weights_are_those_of_the_recipe(fields):
    recipe, model = Recipe(**fields), mlp()
    weights = {
        name: layer.weight.detach().clone() for name, layer in model.named_children() if hasattr(layer, "weight")
    }
    calls = []
    rtn_(model, plan_layers(model, recipe), None, progress=lambda done, total, text: calls.append((done, total, text)))
    for name, layer in quantized_layers(model).items():
        expected = quantize(weights[name], weight_spec(recipe.layer(name), tuple(weights[name].shape)))
        assert torch.equal(layer.weight, expected.dequantize())
    assert calls == [(0, 2, "0"), (1, 2, "2")]


def test_inputs_that_matter_more_are_rounded_with_less_error():
    recipe, data = Recipe(weights=3), torch.randn(256, 24)
    data[:, :4] *= 30
    plain, weighed = mlp(), mlp()
    reference = mlp()[0].weight.detach()
    rtn_(plain, plan_layers(plain, recipe), None)
    rtn_(weighed, plan_layers(weighed, recipe), [data])
    errors = [(model[0].weight - reference)[:, :4].square().sum() for model in (plain, weighed)]
    assert errors[1] < errors[0]


def test_the_input_of_a_layer():
    recipe = Recipe(weights=4, activations="dybit8plain", activation_mode="static").layer("0")
    model = mlp()
    seen = calibrate(model, {"0": model[0]}, [torch.rand(64, 24)])["0"]
    spec, scale, offset = layer_input(recipe, model[0], seen)
    assert spec.mode == "static" and spec.format.startswith("u") and scale.shape == (1,) and offset is None
    assert layer_input(Recipe(weights=4).layer("0"), model[0]) == (None, None, None)
