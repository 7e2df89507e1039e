"""Tests of the plan: which layers, by which recipe. What a model makes of it is in test_model.py."""

import copy

import pytest
import torch
from helpers import Tied
from torch import nn

from dybit import quantize_
from dybit.errors import DyBitError
from dybit.models.plan import Plan, Ties, plan_layers
from dybit.recipe import LayerRecipe, Recipe
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec


def test_layers_in_the_order_of_the_model_with_their_recipes():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(2, 2, 1), nn.Embedding(3, 2))
    plans = plan_layers(model, Recipe(weights=4, rules={"0": {"weights": 2}}))
    assert [(plan.name, plan.recipe.weights) for plan in plans] == [("0", 2), ("2", 4), ("3", 8)]
    assert all(plan.module is model.get_submodule(plan.name) for plan in plans)


def test_tied_layers_agree():
    plans = plan_layers(Tied(), Recipe(weights=4))
    assert {plan.recipe.weights for plan in plans if plan.name != "hidden"} == {8}


def test_nothing_to_do():
    with pytest.raises(DyBitError, match="keeps every layer in floating point"):
        plan_layers(nn.Linear(2, 2), Recipe(weights=None))


def test_ties_remember_shared_parameters_only():
    one, two = nn.Linear(4, 2), nn.Linear(4, 2)
    two.weight = one.weight
    alone = nn.Linear(4, 2)
    ties = Ties([Plan(name, module, LayerRecipe()) for name, module in {"a": one, "b": two, "c": alone}.items()])
    weight = quantize(torch.ones(2, 4), TensorSpec("s4", (2, 4)))
    for module in (one, alone):
        ties.put(module.weight, weight)
    assert ties.get(two.weight) is weight and ties.get(alone.weight) is None


@pytest.mark.parametrize("scale", ["e4m3", "pow2"])
def test_weights_that_scales_cannot_hold_are_refused_before_anything_is_changed(scale):
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = 1e30
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DyBitError, match=r"layer '1': weight holds a magnitude of 1e\+30"):
        quantize_(model, Recipe(weights=4, scale=scale))
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert plan_layers(model, Recipe(weights=4)) and plan_layers(model, Recipe(weights=None, activations=4))
