"""Modules turned into quantized ones: the same objects, copied and pickled like others."""

import copy
import io
import pickle

import pytest
import torch
from helpers import inputs
from quantized_models import RECIPES, each_layer, quantized
from torch import nn

from dybit.layers.quantized import Quantized, original_class, quantized_layers
from dybit.models.preparation import dequantize_
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

pytestmark = pytest.mark.usefixtures("plain_torch")


@each_layer
@torch.no_grad()
def test_copies_and_pickles(name):
    model = quantized(name, RECIPES["w8a8"])
    arguments = inputs(name)
    expected = model(*arguments)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(*arguments), expected)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    twin = copy.deepcopy(model)
    for layer in quantized_layers(twin).values():
        for buffer in layer.buffers(recurse=False):
            buffer.zero_()
    assert torch.equal(model(*arguments), expected)


def test_hooks_survive():
    seen = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
    quantize_(model, Recipe(activations=8), [torch.randn(3, 4)])
    seen.clear()
    model(torch.randn(3, 4))
    dequantize_(model)(torch.randn(3, 4))
    assert seen == ["pre", "forward"] * 2


def test_the_module_stays_the_same_object():
    linear = nn.Linear(4, 2)
    model = quantize_(nn.Sequential(linear), Recipe())
    assert model[0] is linear and isinstance(linear, nn.Linear) and isinstance(linear, Quantized)
    assert original_class(linear) is nn.Linear
    assert type(linear).__name__ == "QuantizedLinear"
    assert [name for name, _ in linear.named_parameters()] == ["bias"]
    assert {name for name, _ in linear.named_buffers()} == {"weight", "weight_scale", "weight_choice"}
    assert linear.weight.shape == (2, 4) and linear.weight.dtype == torch.float32
