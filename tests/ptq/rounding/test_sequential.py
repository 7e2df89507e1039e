"""GPTQ of whole models: closer to the original than rounding, whatever the layers; blocks, ties, and what is missed."""

import copy

import pytest
import torch
from helpers import Tied
from rounding_sequential_cases import mixed, mlp
from torch import nn

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.quantized import quantized_layers
from dybit.measure.fidelity import compare_models
from dybit.ptq.quantize import quantize_
from dybit.ptq.rounding import sequential
from dybit.recipe import Recipe


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 17 * 17, 5),
    ).eval()


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()


MODELS = {
    "mlp": (mlp, mixed(64, 24)),
    "cnn": (cnn, mixed(8, 3, 17, 17)),
    "transformer": (encoder, mixed(8, 12, 16)),
}


@pytest.mark.parametrize(("make", "batches"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "recipe",
    [Recipe(weights=3), Recipe(weights="int4", group_size=8, scale="bf16", activations=8)],
    ids=["W3", "W4A8"],
)
def test_closer_than_rounding(make, batches, recipe):
    model, levels = make(), {}
    for algorithm in ("rtn", "gptq"):
        quantized = quantize_(make(), recipe, iter(batches), algorithm=algorithm)
        levels[algorithm] = compare_models(model, quantized, batches).sqnr
    assert levels["gptq"] > levels["rtn"] + (1.0 if recipe.activations is None else 0.0)


def test_few_inputs_that_say_nothing_do_no_harm():
    batches = [torch.randn(24, 24, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    model, levels = mlp(), {}
    for algorithm in ("rtn", "gptq"):
        quantized = quantize_(mlp(), Recipe(weights=4), batches[:1], algorithm=algorithm)
        levels[algorithm] = compare_models(model, quantized, batches[1:]).sqnr
    assert levels["gptq"] > levels["rtn"] - 0.3


def test_later_blocks_see_the_errors_of_earlier_ones():
    batches = mixed(64, 24)
    quantized = quantize_(mlp(), Recipe(weights=2), batches, algorithm="gptq")
    alone = mlp()
    alone[0] = copy.deepcopy(quantized[0])
    inputs = [alone[:2](batch) for batch in batches]
    expected = quantize_(nn.Sequential(mlp()[2]).eval(), Recipe(weights=2), inputs, algorithm="gptq")
    assert torch.allclose(quantized[2].weight, expected[0].weight, atol=1e-5)


@pytest.mark.filterwarnings("ignore:calibration never reached")
def test_without_blocks_and_in_portions(monkeypatch):
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right, self.top = nn.Linear(24, 8), nn.Linear(24, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.top(torch.relu(self.left(x)) * self.right(x))

    batches = mixed(64, 24)
    rounded = quantize_(Tree().eval(), Recipe(weights=3), batches)
    levels = [compare_models(Tree().eval(), rounded, batches).sqnr]
    for room in (1 << 30, 1):
        monkeypatch.setattr(sequential, "_GATHERED", room)
        found = quantize_(Tree().eval(), Recipe(weights=3), batches, algorithm="gptq")
        levels.append(compare_models(Tree().eval(), found, batches).sqnr)
    assert min(levels[1:]) > levels[0] + 1


def test_layers_that_calibration_misses_are_rounded():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused = mlp(), nn.Linear(5, 3)

        def forward(self, x):
            return self.body(x)

    with pytest.warns(DyBitWarning, match="calibration never reached 1 layers, .*: unused"):
        model = quantize_(Partly().eval(), Recipe(weights=4), mixed(64, 24), algorithm="gptq")
    assert len(quantized_layers(model)) == 4


def test_tied_weights_stay_tied():
    model = quantize_(Tied().eval(), Recipe(weights=4), [torch.randint(11, (4, 6))], algorithm="gptq")
    assert len(quantized_layers(model)) == 3
    assert model.head._buffers["weight"] is model.embedding._buffers["weight"]


def test_the_mode_of_every_module_is_kept():
    model = mlp()
    model[1].train()
    quantize_(model, Recipe(weights=4), mixed(8, 24), algorithm="gptq")
    assert model[1].training and not model[0].training


def test_nan_in_calibration():
    with pytest.raises(DyBitError, match="calibration gives layer '0' inputs with NaN or infinity"):
        quantize_(mlp(), Recipe(weights=4), [torch.full((2, 24), torch.nan)], algorithm="gptq")


def test_memory_is_checked_before_any_work(monkeypatch):
    monkeypatch.setattr(sequential, "_free_memory", lambda: 50_000)
    with pytest.raises(DyBitError, match=r"'gptq' needs up to 0.0 GB for Hessians, most of it for layer '2'.*are free"):
        quantize_(mlp(), Recipe(weights=4), mixed(8, 24), algorithm="gptq")
    monkeypatch.setattr(sequential, "_free_memory", lambda: None)
    quantize_(mlp(), Recipe(weights=4), mixed(8, 24), algorithm="gptq")
