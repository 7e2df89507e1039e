"""Quantized layers under torch.fx: nodes of the graph, without help from the user."""

import pytest
import torch
from helpers import LAYERS, Padded, build, inputs
from torch import fx, nn

from dybit.ptq.quantize import quantize_
from dybit.qat.prepare import prepare_qat_
from dybit.recipe import Recipe

RECIPES = [Recipe(weights=4, embeddings=4), Recipe(weights=4, embeddings=4, activations=8)]
NAMES = [name for name in LAYERS if name not in ("tied", "encoder", "lstm_packed", "cells")]  # one layer, traceable


class Around(nn.Module):
    """A layer inside of a model."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, y=None, z=None):
        return self.layer(x) * 2 if y is None else self.layer(x, y, z) * 2


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths", "ignore:LSTM with projections")
@pytest.mark.parametrize("recipe", RECIPES, ids=["w4", "w4a8"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_are_leaves(name, recipe):
    model, arguments = Around(build(name)).eval(), inputs(name)
    quantize_(model, recipe, [arguments])
    traced = fx.symbolic_trace(model, {} if len(arguments) == 3 else {"y": None, "z": None})
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(called) == 1 and called[0].startswith("layer")
    with torch.no_grad():
        assert torch.equal(traced(*arguments), model(*arguments))


class Everything(fx.Tracer):
    """Takes no module for a leaf, and remembers which it was in, as torchvision's feature extractor."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.is_leaf_module = lambda module, name: False

    def call_module(self, module, forward, args, kwargs):
        self.seen.append(self.path_of_module(module))
        return super().call_module(module, forward, args, kwargs)


def test_other_tracers():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Padded(1, 1, 1)).eval()
    x = torch.randn(1, 8, 8)
    quantize_(model, Recipe(weights=4, activations=8), [x])
    tracer = Everything()
    graph = tracer.trace(model)
    assert tracer.seen == ["0", "1", "2"]
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "2"]
    assert not tracer.is_leaf_module(model[0], "0")
    with torch.no_grad():
        assert torch.equal(fx.GraphModule(model, graph)(x), model(x))


def test_hooks_run_once():
    seen = []
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    model[0].register_forward_hook(lambda *_: seen.append(1))
    quantize_(model, Recipe(weights=4))
    traced = fx.symbolic_trace(model)
    assert not seen
    traced(torch.randn(1, 8))
    assert seen == [1]


def test_named_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(input=x)

    model, x = quantize_(Named().eval(), Recipe(weights=4)), torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(model)(x), model(x))


def test_layers_in_training_are_leaves():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(32, 8)
    prepare_qat_(model, Recipe(weights=4, activations=3), [x])
    model.eval()
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
