import copy
import itertools
import math

import numpy as np
import pytest
import torch
from convolutional import PRODUCTS, error, images, network, pair
from helpers import build, inputs, numpy_units
from torch import nn

import dybit
from dybit.errors import DyBitError, DyBitWarning
from dybit.formats import catalogue
from dybit.layers.quantized import quantized_layers
from dybit.ptq.corrections import moments as moments_module
from dybit.ptq.corrections.adaround import adaround_
from dybit.ptq.corrections.lockstep import Call
from dybit.ptq.corrections.moments import measure
from dybit.ptq.corrections.nearest_two import Candidates, descend
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch, of even kernels
FORMATS = [
    {"weights": 4},
    {"weights": 2},
    {"weights": "int3"},
    {"weights": "nf4"},
    {"weights": "flint4"},
    {"weights": "ant4"},
]
LAYOUTS = [
    {"granularity": "tensor"},
    {"group_size": 4},
    {"scale": "bf16"},
    {"scale": "pow2"},
    {"scale": "e4m3", "group_size": 4},
    {"weights": "nvfp4", "group_size": 16},
]


def levels_of(weight):
    """The index of every element's level among those of its codebook, by the oracle."""
    spec = weight.spec
    books = catalogue.family(spec.family).books
    choice = np.zeros((1, 1), int) if weight.choice is None else weight.choices().numpy()
    choice, codes = numpy_units(choice, spec), weight.codes().numpy()
    values = np.stack([book.values for book in books])[choice, codes]
    index = np.empty(values.shape, int)
    for number, book in enumerate(books):
        mask = choice == number
        index[mask] = np.searchsorted(book.levels, values[mask])
    return index


@pytest.mark.parametrize("recipe", FORMATS + LAYOUTS, ids=str)
def test_error_falls_and_codes_move_to_neighbours(recipe):
    recipe = {"weights": 3, **recipe}
    quantized, reference = pair(network(), images(), **recipe)
    start = copy.deepcopy(quantized)
    assert adaround_(quantized, reference, images()) is quantized
    assert error(quantized, reference, images()) < error(start, reference, images())
    moved = 0
    for name, layer in quantized_layers(quantized).items():
        before, after = start.get_submodule(name).quantized_tensor(), layer.quantized_tensor()
        assert after.spec == before.spec and after.packed.shape == before.packed.shape
        change = levels_of(after) - levels_of(before)
        assert set(np.unique(change)) <= {-1, 0, 1}
        moved += np.count_nonzero(change)
        ratio = before.scales() / after.scales()
        if recipe.get("scale") in ("pow2", "e4m3") or recipe.get("granularity") == "tensor":
            assert torch.equal(ratio, torch.ones_like(ratio))
    assert moved


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("activations", [None, 8])
def test_every_kind_of_layer(name, activations):
    model, data = nn.Sequential(build(name)), [inputs(name, seed)[0] for seed in range(4)]
    quantized, reference = pair(model, data, activations=activations)
    before = error(quantized, reference, data)
    adaround_(quantized, reference, data)
    assert error(quantized, reference, data) < before


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


def test_descent_against_all_choices():
    """Never above where it began, at a point that no single flip improves, and at times the best of all 2^8 choices."""
    best = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
        second = (x.T @ x / 40)[None]
        target, low = torch.randn(1, 1, 8, generator=generator), torch.full((1, 1, 8), -1.0)
        cross, step = target @ second, torch.full((1, 1, 8), 2.0)

        def cost(w, second=second, cross=cross):
            return float((w @ second * w).sum() - 2 * (w * cross).sum())

        gradient = low @ second - cross
        flipped = descend(step, second, gradient, 50)
        found = low + flipped * step
        assert torch.allclose(gradient, found @ second - cross, atol=1e-3)
        for j in range(8):
            other = found.clone()
            other[..., j] *= -1
            assert cost(other) >= cost(found) - 1e-4
        choices = [cost(torch.tensor(c)[None, None]) for c in itertools.product((-1.0, 1.0), repeat=8)]
        assert cost(found) <= cost(low) + 1e-5
        best += cost(found) <= min(choices) + 1e-4
    assert best >= 5


@pytest.mark.parametrize("columns", [5, 64, 150])
def test_blocks_make_no_difference(columns):
    x = torch.randn(300, columns)
    second, step = (x.T @ x / 300)[None], torch.randn(1, 7, columns)
    gradient = torch.randn(1, 7, columns)
    start = gradient.clone()
    flipped = descend(step, second, gradient, 1)
    expected, running = torch.zeros_like(flipped), start.clone()
    for j in range(columns):
        gain = step[:, :, j] * (2 * running[:, :, j] + second[0, j, j] * step[:, :, j])
        expected[:, :, j] = gain < 0
        running += (expected[:, :, j] * step[:, :, j])[..., None] * second[0, j]
    assert (flipped != expected).float().mean() < 0.01  # but for ties of rounding errors
    assert torch.allclose(start + (flipped * step) @ second, gradient, atol=1e-3)


@pytest.mark.parametrize("family", ["dybit4spare", "dybit2mid", "nf4", "e2m1"])
def test_candidates_enclose_the_weight(family):
    matrix = torch.randn(6, 20)
    weight = quantize(matrix, TensorSpec(family, (6, 20)))
    found = Candidates.of(matrix, weight)
    assert torch.allclose(found.now * found.scale, weight.dequantize(), atol=1e-6)
    low, high = torch.minimum(found.now, found.other), torch.maximum(found.now, found.other)
    ratio = matrix / found.scale
    inside = (found.share > 0) & (found.share < 1)
    assert bool((low <= ratio)[inside].all()) and bool((ratio <= high)[inside].all())
    assert torch.allclose((low + found.share * (high - low))[inside], ratio[inside], atol=1e-5)


def test_dead_inputs_and_channels():
    model = network()
    with torch.no_grad():
        model[3].weight[2] = 0
        model[5].weight[0] = 0
        model[1].weight[3], model[1].bias[3] = 0, -1  # always zero after the ReLU
    for data in (images(), [x * 0 for x in images()], [x[:1] for x in images(1)]):
        quantized, reference = pair(model, images(), activations=8)
        adaround_(quantized, reference, data)
        assert all(bool(torch.isfinite(value.float()).all()) for value in quantized.state_dict().values())
        assert error(quantized, reference, data) < 1


def test_rejects_and_warns():
    quantized, reference = pair(network(), images())
    state = copy.deepcopy(quantized.state_dict())
    with pytest.raises(DyBitError, match="layer '0': calibration gives it inputs with NaN"):
        adaround_(quantized, reference, [images()[0] * math.nan])
    with pytest.raises(DyBitError, match="yields no batch"):
        adaround_(quantized, reference, [])
    assert all(torch.equal(value, quantized.state_dict()[key]) for key, value in state.items())


class Odd(nn.Linear):
    """A layer whose forward is no product with its weight."""

    def forward(self, x):
        return (x[..., None, :] * self.weight).sum(-1)


def test_layers_that_are_no_products_stay():
    model = nn.Sequential(Odd(6, 4))
    quantized = dybit.quantize_(copy.deepcopy(model), dybit.Recipe(weights=3))
    before = quantized[0].quantized_tensor().packed.clone()
    with pytest.warns(DyBitWarning, match="'0' stays as it is"):
        adaround_(quantized, model, [torch.randn(5, 6)])
    assert torch.equal(quantized[0].quantized_tensor().packed, before)


def test_inputs_only():
    model = network()
    quantized = dybit.quantize_(copy.deepcopy(model), dybit.Recipe(weights=None, activations=8), images())
    with pytest.raises(DyBitError, match="no quantized layer that can be corrected"):
        adaround_(quantized, model, images())


def test_checkpoint_and_chain(tmp_path):
    data = images()
    quantized = dybit.quantize_(network(), dybit.Recipe(weights=3, activations=8), data, algorithm=["adaround", "bias"])
    dybit.save(quantized, tmp_path / "model")
    assert torch.equal(dybit.load(tmp_path / "model", network())(data[0]), quantized(data[0]))
    again = dybit.quantize_(network(), dybit.Recipe(weights=3, activations=8), data, algorithm=["adaround", "bias"])
    assert torch.equal(again(data[0]), quantized(data[0]))
