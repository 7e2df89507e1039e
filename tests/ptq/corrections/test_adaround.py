import copy
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
from dybit.ptq.corrections.adaround import adaround_

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
