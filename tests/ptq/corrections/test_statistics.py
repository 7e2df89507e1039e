import copy
import math

import pytest
import torch
from convolutional import PRODUCTS, error, images, network, pair
from helpers import build, inputs
from torch import nn

import dybit
from dybit.errors import DyBitError
from dybit.layers.quantized import quantized_layers
from dybit.ptq.corrections.statistics import correct_bias_, match_statistics_
from dybit.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch, of even kernels


def moments(model, name, data):
    """Mean and variance of a layer's outputs, channel by channel, by a hook."""
    seen = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        for batch in data:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    handle.remove()
    dim = seen[0].ndim - (len(layer.kernel_size) if hasattr(layer, "kernel_size") else 0) - 1
    flat = torch.cat([y.movedim(dim, 0).flatten(1) for y in seen], dim=1).double()
    return flat.mean(1), flat.var(1, correction=0)


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize("group_size", [None, 4])
def test_means_and_variances_match(activations, group_size):
    model, data = network(), images()
    quantized, reference = pair(model, data, activations=activations, group_size=group_size, scale="fp32")
    before = error(quantized, reference, data)
    assert match_statistics_(quantized, reference, data) is quantized
    for name in quantized_layers(quantized):
        mean, variance = moments(quantized, name, data)
        wanted_mean, wanted_variance = moments(reference, name, data)
        assert torch.allclose(mean, wanted_mean, atol=1e-4)
        assert torch.allclose(variance, wanted_variance, rtol=1e-3, atol=1e-5)
    assert error(quantized, reference, data) < before


@pytest.mark.parametrize(
    "recipe", [{"scale": "pow2"}, {"granularity": "tensor"}, {"weights": "nvfp4", "group_size": 16}]
)
def test_scales_that_cannot_be_stretched_stay(recipe):
    quantized, reference = pair(network(), images(), **recipe)
    before = {k: v for k, v in quantized.state_dict().items() if "bias" not in k}
    match_statistics_(quantized, reference, images())
    for key, value in before.items():
        assert torch.equal(quantized.state_dict()[key].view(torch.uint8), value.view(torch.uint8))
    for name in quantized_layers(quantized):
        means = [moments(m, name, images())[0] for m in (quantized, reference)]
        assert torch.allclose(*means, atol=1e-4)


def test_bf16_scales():
    quantized, reference = pair(network(), images(), scale="bf16")
    match_statistics_(quantized, reference, images())
    for name, layer in quantized_layers(quantized).items():
        assert layer.weight_scale.dtype == torch.bfloat16
        ours, wanted = (moments(m, name, images()) for m in (quantized, reference))
        assert torch.allclose(ours[0], wanted[0], atol=1e-4)
        assert torch.allclose(ours[1], wanted[1], rtol=2e-2, atol=1e-5)


def test_correct_bias_leaves_weights():
    quantized, reference = pair(network(), images())
    before = {k: v for k, v in quantized.state_dict().items() if "bias" not in k}
    correct_bias_(quantized, reference, images())
    assert all(torch.equal(quantized.state_dict()[key], value) for key, value in before.items())
    for name in quantized_layers(quantized):
        assert torch.allclose(moments(quantized, name, images())[0], moments(reference, name, images())[0], atol=1e-4)


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_kind_of_layer(name):
    model, data = nn.Sequential(build(name)), [inputs(name, seed) for seed in range(3)]
    quantized, reference = pair(model, data, activations=8)
    match_statistics_(quantized, reference, data)
    (ours, theirs) = (moments(m, "0", data) for m in (quantized, reference))
    assert torch.allclose(ours[0], theirs[0], atol=1e-4)
    assert torch.allclose(ours[1], theirs[1], rtol=1e-2, atol=1e-4)


def test_checkpoint_restores_added_biases(tmp_path):
    model, data = network(), images()
    quantized = dybit.quantize_(copy.deepcopy(model), Recipe(weights=4, activations=8), data, algorithm="statistics")
    assert quantized[3].added_bias and quantized[3].bias is not None and not quantized[9].added_bias
    dybit.save(quantized, tmp_path / "model")
    loaded = dybit.load(tmp_path / "model", network())
    assert loaded[3].added_bias
    assert torch.equal(loaded(data[0]), quantized(data[0]))
    dybit.save(loaded, tmp_path / "again")
    assert torch.equal(dybit.load(tmp_path / "again", network())(data[0]), quantized(data[0]))
    requantized = dybit.quantize_(dybit.dequantize_(loaded), Recipe(weights=8))
    dybit.save(requantized, tmp_path / "eight")
    assert torch.equal(dybit.load(tmp_path / "eight", network())(data[0]), requantized(data[0]))


def test_half_precision_and_copies():
    quantized, reference = pair(network().to(torch.bfloat16), [x.bfloat16() for x in images()])
    match_statistics_(quantized, reference, [x.bfloat16() for x in images()])
    assert quantized[3].bias.dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(quantized)(images()[0].bfloat16()), quantized(images()[0].bfloat16()))


def test_dead_and_constant_channels():
    model = network()
    with torch.no_grad():
        model[3].weight[2] = 0  # a dead channel
        model[5].weight[0] = 0
    data = [x * 0 for x in images()]  # and no variance anywhere
    for batches in (images(), data):
        quantized, reference = pair(model, images())
        match_statistics_(quantized, reference, batches)
        assert all(bool(torch.isfinite(value.float()).all()) for value in quantized.state_dict().values())
        assert error(quantized, reference, batches) < 1


@pytest.mark.parametrize("correct", [match_statistics_, correct_bias_])
def test_rejects(correct):
    quantized, reference = pair(network(), images())
    state = copy.deepcopy(quantized.state_dict())
    with pytest.raises(DyBitError, match="layer '0' outputs with NaN"):
        correct(quantized, reference, [images()[0] * math.nan])
    with pytest.raises(DyBitError, match="yields no batch"):
        correct(quantized, reference, [])
    with pytest.raises(DyBitError, match="does not fit layer '0'"):
        correct(quantized, reference, [torch.zeros(2, 5, 12, 12)])
    assert all(torch.equal(value, quantized.state_dict()[key]) for key, value in state.items())
    with pytest.raises(DyBitError, match="reference must be the model in floating point"):
        correct(quantized, quantized, images())
    with pytest.raises(DyBitError, match="no layer '0'"):
        correct(quantized, nn.Linear(1, 1), images())
    with pytest.raises(DyBitError, match="no quantized layer"):
        correct(reference, reference, images())
