"""Layers whose tensors accelerate moves."""

import copy

import pytest
import torch
from helpers import inputs
from quantized_models import RECIPES, each_layer, quantized
from torch import nn

from dybit.errors import DyBitError
from dybit.layers.quantized import quantized_layers
from dybit.models.preparation import dequantize_
from dybit.operators import linear
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

CPU = torch.device("cpu")
MOVE = """
def move(module, name, device, value=None):
    old = getattr(module, name)
    if value is not None:
        assert old.shape == value.shape, f"{name} has shape {old.shape}, not {value.shape}"
        value = value.to(old.dtype)
    module._buffers[name] = (old if value is None else value).to(device)
"""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


def test_code_that_moves_tensors_by_name_is_given_the_codes():
    scope = {"__name__": "accelerate.utils.modeling"}
    exec(MOVE, scope)  # as set_module_tensor_to_device
    layer = quantize_(nn.Linear(32, 8), Recipe(weights=4)).eval()
    x = torch.randn(3, 32)
    wanted, kept = layer(x), {name: buffer.clone() for name, buffer in layer._buffers.items()}
    for _ in range(3):
        for name in kept:
            scope["move"](layer, name, "meta")
        assert all(buffer.is_meta for buffer in layer._buffers.values())
        assert layer.weight.shape == (8, 32) and layer.weight.dtype == torch.float32
        for name, value in kept.items():
            scope["move"](layer, name, "cpu", value)
        assert torch.equal(layer(x), wanted)


@each_layer
@pytest.mark.parametrize("recipe", ["w4", "w8a8"])
@pytest.mark.parametrize("recorded", [False, True])
def test_codes_without_values_are_not_computed_with(name, recipe, recorded):
    model = quantized(name, RECIPES[recipe])
    for layer in quantized_layers(model).values():
        for key, buffer in layer._buffers.items():
            layer._buffers[key] = None if buffer is None else buffer.to("meta")
    with torch.set_grad_enabled(recorded), pytest.raises((DyBitError, RuntimeError), match=r"on the meta|device meta"):
        model(*(x.requires_grad_(recorded) if x.is_floating_point() else x for x in inputs(name)))


@pytest.mark.parametrize("buffers", [False, True])
@each_layer
@torch.no_grad()
def test_offloaded_layers_compute_the_same(name, buffers, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    x = inputs(name)
    if name.startswith(("attention", "encoder")):
        pytest.skip("torch reads weights of modules that it does not call, also in floating point")
    for recipe in ("w4", "w8a8", "w6a4_dynamic_groups"):
        model = quantized(name, RECIPES[recipe])
        wanted = model(*x)
        on_disk = accelerate.disk_offload(copy.deepcopy(model), tmp_path / recipe, CPU, offload_buffers=buffers)
        in_memory = accelerate.cpu_offload(model, CPU, offload_buffers=buffers)
        for offloaded in (on_disk, in_memory):
            for _ in range(2):
                assert torch.equal(offloaded(*x), wanted)
            parts = [part for layer in quantized_layers(offloaded).values() for part in layer._buffers.values()]
            assert all(part.is_meta for part in parts if part is not None) == buffers
        accelerate.hooks.remove_hook_from_submodules(on_disk)
        assert torch.equal(on_disk(*x), wanted)


@torch.no_grad()
def test_modules_of_several_devices_and_preloaded_blocks(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(3, 32)
    model = quantize_(network(), Recipe(weights=4))
    wanted = model(x)
    places = {"0": "cpu", "1": "cpu", "2": "disk"}
    spread = accelerate.dispatch_model(copy.deepcopy(model), places, offload_dir=tmp_path, offload_buffers=True)
    preloaded = accelerate.cpu_offload(model, CPU, offload_buffers=True, preload_module_classes=["Sequential"])
    for _ in range(3):
        assert torch.equal(spread(x), wanted) and torch.equal(preloaded(x), wanted)
    assert spread[2]._buffers["weight"].is_meta and not spread[0]._buffers["weight"].is_meta


@torch.no_grad()
def test_offloaded_codes_are_not_kept_in_memory(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    x, before = torch.randn(3, 32), len(linear._cache)
    model = quantize_(network(), Recipe(weights=4))
    wanted = model(x)  # packs the weights, too
    accelerate.disk_offload(model, tmp_path, CPU, offload_buffers=True)
    for _ in range(4):
        assert torch.equal(model(x), wanted)
        assert not any("_prepared" in vars(module) for module in model)
        assert len(linear._cache) <= before


@torch.no_grad()
def test_other_codes_of_an_offloaded_layer_are_not_stale():
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(3, 32)
    model, other = (quantize_(nn.Sequential(nn.Linear(32, 8)), Recipe(weights=4)) for _ in range(2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate.cpu_offload(model, CPU, offload_buffers=True, state_dict=state)
    model(x)
    for name, tensor in other.state_dict().items():
        state[name].copy_(tensor)
    assert torch.equal(model(x), other(x))


def test_an_offloaded_model_is_not_dequantized():
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(3, 32)
    model = quantize_(network(), Recipe(weights=4))
    wanted = model(x)
    accelerate.cpu_offload(model, CPU)
    with pytest.raises(DyBitError, match=r"module '0' is offloaded .* call accelerate's remove_hook_from_submodules"):
        dequantize_(model)
    assert torch.equal(model(x), wanted)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.allclose(dequantize_(model)(x), wanted, atol=1e-6)
