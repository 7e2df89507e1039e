"""Forwards that were put on modules themselves, as accelerate's hooks are."""

import copy
import functools

import pytest
import torch
from helpers import SelfAttention
from torch import nn

from dybit.errors import DyBitWarning
from dybit.layers.kinds import weight_names
from dybit.layers.patched_forward import has_hooks, replaced_forwards
from dybit.models.preparation import dequantize_
from dybit.ptq.quantize import quantize_
from dybit.qat.prepare import convert_, prepare_qat_
from dybit.recipe import Recipe


def hook_(module):
    """As accelerate's add_hook_to_module."""
    old = module._old_forward = module.forward

    def new_forward(module, *args, **kwargs):
        module.calls += 1
        return module._old_forward(*args, **kwargs)

    module.calls = 0
    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)


def unhook_(module):
    """As accelerate's remove_hook_from_module."""
    module.forward = module._old_forward
    del module._old_forward


def close_(module):
    """Keeps the old forward where nobody can find it."""
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), lambda: torch.randn(64, 8)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), lambda: torch.randn(4, 3, 9, 9)),
    "attention": (lambda: SelfAttention(batch_first=True), lambda: torch.randn(3, 5, 8)),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def layers(model):
    return [module for module in model.modules() if weight_names(module)]


@pytest.mark.parametrize(
    "recipe", [Recipe(weights=8, activations=3, activation_mode="static"), Recipe(weights=4)], ids=["w8a3", "w4"]
)
@pytest.mark.parametrize("patch", [hook_, close_])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_hooks_from_before_quantization(name, patch, recipe):
    x = MODELS[name][1]()
    plain = quantize_(build(name), recipe, [x])
    model = build(name)
    for layer in layers(model):
        patch(layer)
    if name == "attention" and patch is close_:
        # Torch's attention computes, which never calls its output projection.
        with pytest.warns(DyBitWarning, match="calibration never reached 1 layers, .*: attention.out_proj"):
            quantize_(model, recipe, [x])
        assert model.attention.out_proj.input_spec is None
        assert (plain.attention.out_proj.input_spec is None) == (recipe.activations is None)
        return
    quantize_(model, recipe, [x])
    expected = plain(x)
    assert torch.allclose(model(x), expected, atol=1e-5)
    if patch is hook_:
        assert all(layer.calls > 0 for layer in layers(model))
        assert torch.equal(copy.deepcopy(model)(x), expected)
    if patch is hook_:
        for layer in layers(model):
            unhook_(layer)
        assert torch.equal(model(x), expected)
    dequantize_(model)
    assert torch.equal(model(x), dequantize_(plain)(x))


@pytest.mark.parametrize("patch", [hook_, close_])
def test_hooks_from_before_training(patch):
    x = MODELS["linear"][1]()
    recipe = Recipe(weights=8, activations=3, activation_mode="static")
    plain = prepare_qat_(build("linear"), recipe, [x])
    model = build("linear")
    for layer in layers(model):
        patch(layer)
    prepare_qat_(model, recipe, [x])
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert torch.allclose(convert_(model)(x), convert_(plain)(x), atol=1e-5)


def test_forwards_are_put_back():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    close_(first)
    kept = first.forward
    with pytest.raises(ZeroDivisionError), replaced_forwards({first: lambda x: x, second: lambda x: x}):
        assert first(1) == second(1) == 1
        raise ZeroDivisionError
    assert first.forward is kept and "forward" not in vars(second)


@pytest.mark.filterwarnings("ignore:calibration never reached")
@pytest.mark.parametrize("name", MODELS)
def test_calibration_keeps_the_hooks(name):
    model = build(name)
    for layer in layers(model):
        close_(layer)
    before = [layer.forward for layer in layers(model)]
    quantize_(model, Recipe(weights=4, activations=8, activation_mode="dynamic"), [MODELS[name][1]()])
    dequantize_(model)
    assert [layer.forward for layer in layers(model)] == before


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_hooks_are_seen_until_they_are_removed(register):
    layer = nn.Linear(2, 2)
    assert not has_hooks(layer)
    handle = getattr(layer, register)(lambda *args: None)
    assert has_hooks(layer)
    handle.remove()
    assert not has_hooks(layer)
