"""Modules turned into quantized ones: the same objects, copied and pickled like others."""

import copy
import io
import pickle

import pytest
import torch
from helpers import inputs
from quantized_models import RECIPES, each_layer, quantized
from torch import nn

from dybit.errors import DyBitError
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


PEFT = """
import copy
class ModulesToSaveWrapper:
    def update(self, module):
        return copy.deepcopy(module)
"""


@pytest.mark.parametrize("container", [False, True])
def test_copies_that_peft_would_train_are_refused(container):
    scope = {"__name__": "peft.utils.other"}
    exec(PEFT, scope)
    layer = nn.Linear(8, 4)
    head = nn.Sequential(nn.LayerNorm(8), layer) if container else layer
    quantize_(head, Recipe(weights=4))
    with pytest.raises(
        DyBitError, match="modules_to_save of PEFT has a QuantizedLinear, whose codes cannot be trained"
    ):
        scope["ModulesToSaveWrapper"]().update(head)
    copy.deepcopy(head)
    copied = scope["ModulesToSaveWrapper"]().update(dequantize_(head))
    assert all(parameter.is_floating_point() for parameter in copied.parameters())


def test_modules_to_save_of_peft():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))})
    quantize_(model, Recipe(weights=4))
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    with pytest.raises(DyBitError, match="modules_to_save of PEFT has a QuantizedLinear"):
        peft.get_peft_model(copy.deepcopy(model), config)
    dequantize_(model["head"])
    trained = [name for name, p in peft.get_peft_model(model, config).named_parameters() if p.requires_grad]
    assert any(name.endswith("modules_to_save.default.1.weight") for name in trained)
