import copy

import pytest
import torch
from helpers import decoder, error, outliers_
from torch import nn

import dybit
from dybit.errors import DyBitError
from dybit.layers.kinds import weight_names
from dybit.ptq.transforms import smooth
from dybit.ptq.transforms.smooth import smooth_
from dybit.recipe import LayerRecipe

BATCHES = [{"input_ids": torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(i))} for i in range(2)]
RECIPES = {
    "weights": {"weights": "int4"},
    "groups": {"weights": "int4", "group_size": 16},
    "variants": {"weights": 4},
    "static": {"weights": "int4", "activations": "int4", "activation_method": "absmax"},
    "token": {"weights": "int4", "activations": "int4", "activation_mode": "dynamic"},
    "inputs alone": {"weights": None, "activations": "int4", "activation_mode": "dynamic"},
}


def spiky():
    """A decoder with outliers where norms, values and gated products have them."""
    model = decoder()
    for layer in model.model.layers:
        outliers_(layer.input_layernorm)
        outliers_(layer.post_attention_layernorm, (3,))
        outliers_(layer.mlp.up_proj, (5, 30))
        outliers_(layer.self_attn.v_proj, (2,))
    return model


def recipes(model, **fields):
    layers = {name for name, module in model.named_modules() if weight_names(module) == ("weight",)}
    return {name: LayerRecipe(**fields) for name in layers if "embed" not in name}


@pytest.mark.parametrize("name", ["variants", "static", "token", "inputs alone"])
def test_quantized_outputs_are_closer(name):
    errors = []
    for algorithm in (None, "smooth"):
        model = spiky()
        dybit.quantize_(model, dybit.Recipe(embeddings=None, **RECIPES[name]), BATCHES, algorithm=algorithm)
        errors.append(error(model, spiky(), BATCHES))
    assert errors[1] < 0.9 * errors[0]


def test_the_function_stays():
    model = spiky()
    smooth_(model, recipes(model, **RECIPES["token"]), BATCHES)
    assert error(model, spiky(), BATCHES) < 1e-5
    layer, before = model.model.layers[0], spiky().model.layers[0]
    for part in ("input_layernorm", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.up_proj"):
        assert not torch.equal(layer.get_submodule(part).weight, before.get_submodule(part).weight)
    outlier = before.input_layernorm.weight / layer.input_layernorm.weight
    assert outlier[[1, 7]].min() > 2 * outlier.median()


def test_nothing_to_quantize():
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    smooth_(model, {}, BATCHES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["weights", "groups"])
def test_errors_of_layers(name):
    """Never larger on what was tried, and smaller in sum on other inputs: of weights alone, whose errors are small."""
    model = spiky()
    table = recipes(model, **RECIPES[name])
    links = [link for link in smooth.find_links(model, BATCHES[0]) if smooth._suits(link, table)]
    readers = {name: model.get_submodule(name) for link in links for name in link.readers}
    others = [{"input_ids": batch["input_ids"].flip(0, 1)} for batch in BATCHES]
    tried, unseen = (smooth.calibrate(model, readers, batches) for batches in (BATCHES, others))
    before = after = 0.0
    for link in links:
        judge = smooth._Judge(model, link, table, tried, {})
        best = judge.best()
        assert best is None or judge._error(best) < judge._error(None)
        judge = smooth._Judge(model, link, table, unseen, {})
        before, after = before + judge._error(None), after + judge._error(best)
    assert after < 0.9 * before


def images():
    return [torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def convolutions(activation):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), activation(), nn.Conv2d(8, 8, 3, groups=8), activation(), nn.Conv2d(8, 6, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip
    outliers_(model[0], (2,), 20)
    outliers_(model[2], (4,), 20)
    return model


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_convolutions(activation, tmp_path):
    model = convolutions(activation)
    table = recipes(model, weights="int4", activations="int4", activation_method="absmax")
    smooth_(model, table, images())
    assert error(model, convolutions(activation), images()) < 1e-5
    recipe = dybit.Recipe(weights="int4", activations="int4", activation_method="absmax")
    plain = dybit.quantize_(convolutions(activation), recipe, images())
    smoothed = dybit.quantize_(convolutions(activation), recipe, images(), algorithm="smooth")
    reference = convolutions(activation)
    assert error(smoothed, reference, images()) < error(plain, reference, images())
    dybit.save(smoothed, tmp_path / "out")
    assert torch.equal(dybit.load(tmp_path / "out", convolutions(activation))(images()[0]), smoothed(images()[0]))


def test_producers_that_would_suffer_are_left():
    """Factors on rows are lost in the scales of rows, but not in one scale for a tensor or in powers of two."""
    for fields in ({"granularity": "tensor"}, {"scale": "pow2"}):
        model = spiky()
        smooth_(model, recipes(model, weights="int4", **fields), BATCHES)
        layer, before = model.model.layers[0], spiky().model.layers[0]
        assert torch.equal(layer.mlp.down_proj.weight, before.mlp.down_proj.weight)
        assert not torch.equal(layer.input_layernorm.weight, before.input_layernorm.weight)


def test_only_readers_with_a_recipe_count():
    model = spiky()
    smooth_(model, {"model.layers.1.mlp.down_proj": LayerRecipe(weights="int4")}, BATCHES)
    before = spiky().state_dict()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down")}


def test_channels_that_are_never_used():
    model = spiky()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
        model.model.layers[0].mlp.down_proj.weight[:, 4] = 0
    reference = copy.deepcopy(model)
    smooth_(model, recipes(model, **RECIPES["token"]), BATCHES)
    assert error(model, reference, BATCHES) < 1e-5
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_progress_and_errors():
    calls = []
    model = spiky()
    smooth_(model, recipes(model, weights="int4"), BATCHES, progress=lambda *call: calls.append(call))
    assert calls[-1] == (8, 9, "model.norm") and "calibrating: batch 2" in calls[1][2]
    with pytest.raises(DyBitError, match="does not fit the model"):
        smooth_(model, recipes(model), [torch.ones(2, 3)])
