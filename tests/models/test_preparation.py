"""Models turned back into floating point, and made ready for quantization."""

import copy

import pytest
import torch
from helpers import Tied, build, inputs
from quantized_models import RECIPES, each_layer, quantized
from torch import nn

from dybit.models.preparation import dequantize_
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

pytestmark = pytest.mark.usefixtures("plain_torch")


@each_layer
@torch.no_grad()
def test_dequantize_keeps_the_result(name):
    model, arguments = quantized(name, RECIPES["w4"]), inputs(name)
    expected = model(*arguments)
    keys = set(build(name).state_dict())
    types = [type(m) for m in build(name).modules()]
    assert dequantize_(model) is model
    model.requires_grad_(False)  # torch adds up products with trained matrices in another order
    assert torch.equal(model(*arguments), expected)
    assert set(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    assert build(name).load_state_dict(model.state_dict())
    quantize_(model, RECIPES["w4"])  # and it can be quantized again


@torch.no_grad()
def test_tied_weights_share_their_codes():
    model = quantize_(Tied().eval(), Recipe(weights=4))
    assert model.embedding._buffers["weight"] is model.head._buffers["weight"]
    twin = copy.deepcopy(model)
    assert twin.embedding._buffers["weight"] is twin.head._buffers["weight"]
    assert twin.embedding._buffers["weight"] is not model.head._buffers["weight"]
    assert torch.equal(model.embedding.weight, model.head.weight)
    dequantize_(model)
    assert model.embedding.weight is model.head.weight


def test_dequantized_weights_can_be_trained():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    model[1].weight.requires_grad_(False)
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    dequantize_(copy.deepcopy(quantize_(model, Recipe(weights=4))))
    dequantize_(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == expected
    with torch.inference_mode():
        quantize_(model, Recipe(weights=4))
        dequantize_(model)
    model[0](torch.ones(2, 4)).sum().backward()
    assert model[0].weight.grad is not None
