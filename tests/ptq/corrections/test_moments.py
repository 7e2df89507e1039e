import copy

import pytest
import torch
from convolutional import PRODUCTS
from helpers import build, inputs

import dybit
from dybit.ptq.corrections import moments as moments_module
from dybit.ptq.corrections.lockstep import Call
from dybit.ptq.corrections.moments import measure


@pytest.mark.parametrize("name", [*PRODUCTS, "conv2d_unbatched"])
def test_moments_are_those_of_the_layer(name, monkeypatch):
    """A product with the patches is what the layer computes: so its moments are those of real outputs."""
    model, data = build(name), [inputs(name, seed) for seed in range(2)]
    quantized = dybit.quantize_(copy.deepcopy(model), dybit.Recipe(weights=8))
    calls = [Call(args, {}) for args in data]
    with torch.no_grad():
        found = measure(quantized, model, calls, calls, torch.Generator())
        outputs = [model(*args) for args in data]
        dim = outputs[0].ndim - (len(model.kernel_size) if hasattr(model, "kernel_size") else 0) - 1
        y = torch.cat([output.movedim(dim, 0).flatten(1) for output in outputs], dim=1)
    assert found.count == y.shape[1]
    assert torch.allclose(found.wanted.flatten().float(), y.mean(1), atol=1e-5)
    assert torch.allclose(found.power.flatten(), y.var(1, correction=0), rtol=1e-4, atol=1e-6)
    weight = quantized.weight_specs["weight"].to_matrix(model.weight.detach()).view(found.cross.shape)
    # cov(y, x) = W cov(x, x), and the mean of y is W mean(x) + b.
    assert torch.allclose(found.cross, weight @ found.second, rtol=1e-3, atol=1e-4)
    mean = (weight.double() * found.mean[:, None]).sum(2).flatten()
    bias = 0 if model.bias is None else model.bias.detach().double()
    assert torch.allclose(mean + bias, found.wanted.flatten(), atol=1e-5)


def test_sampling_is_bounded(monkeypatch):
    monkeypatch.setattr(moments_module, "_POSITIONS", 30)
    model = build("conv2d")
    quantized = dybit.quantize_(copy.deepcopy(model), dybit.Recipe(weights=8))
    calls = [Call(inputs("conv2d", seed), {}) for seed in range(3)]
    with torch.no_grad():
        assert measure(quantized, model, calls, calls, torch.Generator()).count == 30
