"""Tests of the search as a whole, on small models."""

import copy
import itertools

import numpy as np
import pytest
import torch
from searched import batches, mlp, mlp_batches, net
from torch import nn

from dybit import (
    AcceleratorCost,
    Candidate,
    CpuCost,
    DyBitError,
    DyBitWarning,
    MaxDrop,
    MaxError,
    MaxSize,
    Recipe,
    SizeCost,
    Speedup,
    quantize_,
    search,
)
from dybit.accelerator import Config, simulate
from dybit.mixed_precision.cost import traced
from dybit.mixed_precision.knapsack import InfeasibleError

SMALL = Config(rows=4, columns=4)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DYBIT_CACHE", str(tmp_path_factory.getbasetemp() / "cells"))


def test_a_speedup_is_met_on_the_simulator():
    model, before = net(), net().state_dict()
    result = search(model, batches(), constraint=Speedup(2.5), cost=AcceleratorCost(SMALL))
    work = traced(result.subject)
    bits = {"*": (8, 8)} | {
        name: candidate.bits for name, candidate in result.problem.layers(result.point.choice).items()
    }
    bits = {name: pair for name, pair in bits.items() if name == "*" or name in {layer.name for layer in work}}
    assert simulate(work, (8, 8), SMALL).cycles / simulate(work, bits, SMALL).cycles >= 2.5
    assert result.point.measured["accelerator"] == simulate(work, bits, SMALL).cycles
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    quantized = quantize_(copy.deepcopy(model), result.recipe, batches())
    assert result.point.error == pytest.approx(result.subject.judge.error(quantized))
    assert result.point.choice["query"] == result.point.choice["key"]


def test_nothing_estimated_better_exists():
    """Exhaustively: 7 groups of 3 candidates."""
    result = search(
        net(), batches(), constraint=Speedup(2.0), cost=AcceleratorCost(SMALL), candidates=["8/8", "4/8", "2/2"]
    )
    problem = result.problem
    table = problem.main
    limit = table.base / 2.0
    best = min(
        problem.error(choice)
        for options in itertools.product(range(3), repeat=len(problem.groups))
        if table.total(
            choice := {n: o for group, o in zip(problem.groups, options, strict=True) for n in group}
        ) <= limit
    )  # fmt: skip
    assert result.point.estimated_error == pytest.approx(best, rel=1e-9)


def test_a_size_and_several_costs():
    result = search(
        net(),
        batches(),
        constraint=[Speedup(2.0), MaxSize(1300)],
        cost=AcceleratorCost(SMALL),
        candidates=["8/8", "4/4", "2/2"],
    )
    assert result.point.measured["size"] <= 1300 and result.point.speedups["accelerator"] >= 2
    assert [table.name for table in result.problem.tables] == ["accelerator", "size"]


def test_the_error_shrinks_with_the_limit():
    errors = [
        search(mlp(), mlp_batches(), constraint=MaxSize(size), candidates=[8, 4, 3, 2]).point.error
        for size in (125, 140, 160)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_front_and_baselines():
    result = search(
        net(), batches(), constraint=Speedup(2.0), cost=AcceleratorCost(SMALL), pareto=6, baselines=True,
        candidates=["8/8", "4/8", "4/4", "2/2"], sensitivity="output",
    )  # fmt: skip
    assert {point.name for point in result.uniform} == {f"uniform {c}" for c in ("W8A8", "W4A8", "W4A4", "W2A2")}
    assert len(result.pareto) == 6 and all(point.error is not None for point in result.pareto)
    estimated = [point.estimated_error for point in result.pareto]
    assert estimated == sorted(estimated)
    assert result.greedy.speedups["accelerator"] >= 2
    assert result.greedy.estimated_error >= result.point.estimated_error


def test_embeddings_are_searched_for_their_size_only():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(30, 8), nn.Linear(8, 5)

        def forward(self, tokens):
            return self.layer(self.table(tokens))

    torch.manual_seed(0)
    model, data = Language().eval(), [torch.randint(0, 30, (4, 6))]
    fast = search(model, data, constraint=Speedup(1.0), cost=AcceleratorCost(SMALL))
    assert list(fast.problem.errors) == ["layer"] and fast.recipe.embeddings == 8
    small = search(model, data, constraint=MaxSize(400), candidates=[8, 4, 2])
    assert "table" in small.problem.errors and small.point.measured["size"] <= 400


def test_layers_that_cannot_be_quantized_stay():
    class Limited(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 3)

        def forward(self, tokens):
            return self.layer(self.table(tokens))

    with pytest.warns(DyBitWarning, match="'table' keeps floating point"):
        result = search(Limited(), [torch.randint(0, 9, (4, 3))], constraint=MaxSize(400), candidates=[8, 2])
    assert list(result.problem.errors) == ["layer"]


def test_cpu_speed_keeps_slow_layers_in_floating_point(tmp_path):
    result = search(
        mlp(), mlp_batches(), constraint=Speedup(0.001), cost=CpuCost(seconds=0.001, cache=tmp_path), rounds=2
    )
    assert result.point.estimated_error == 0 and result.point.error == 0
    assert result.point.measured["cpu"] > 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"constraint": Speedup(99), "cost": AcceleratorCost(SMALL)}, r"speedup of 99.*cannot be reached.*it is \d"),
        ({"constraint": MaxSize(9)}, "size of 9 bytes cannot be reached"),
        ({"constraint": Speedup(2)}, "needs a cost that is a time"),
        ({"constraint": 2.0}, "constraint must be"),
        ({"constraint": MaxSize(900), "cost": SizeCost}, "cost must be"),
        ({"constraint": MaxSize(900), "cost": [SizeCost(), SizeCost()]}, "two of one name"),
        ({"constraint": MaxSize(900), "candidates": []}, "candidates must not be empty"),
        ({"constraint": MaxSize(900), "sensitivity": "x"}, "sensitivity must be"),
        ({"constraint": MaxSize(900), "groups": ["x*"]}, "matches no layer"),
        ({"constraint": Speedup(1), "cost": AcceleratorCost(SMALL), "candidates": ["4"]}, "cannot be reached"),
    ],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(DyBitError, match=message):
        search(mlp(), mlp_batches(), **keywords)


def test_bad_models_and_data():
    with pytest.raises(DyBitError, match=r"batches.*empty"):
        search(mlp(), [], constraint=MaxSize(900))
    with pytest.raises(DyBitError, match="no layer"):
        search(nn.ReLU(), [torch.zeros(1)], constraint=MaxSize(900))
    with pytest.raises(DyBitError, match="does not fit the model"):
        search(mlp(), [torch.zeros(2, 99)], constraint=MaxSize(900))
    with pytest.raises(DyBitError, match="embedding tables only"):
        search(
            nn.Sequential(nn.Embedding(4, 4)), [torch.zeros(1, 2).long()], constraint=Speedup(1), cost=AcceleratorCost()
        )


def test_limits_of_loss_minimise_the_first_cost():
    result = search(net(), batches(), constraint=MaxError(3e-3), cost=AcceleratorCost(SMALL), rounds=8)
    assert 0 < result.point.error <= 3e-3 and result.point.speedups["accelerator"] > 1
    drop = search(net(), batches(4), constraint=MaxDrop(50.0), cost=AcceleratorCost(SMALL), rounds=4)
    assert drop.point.drop <= 50
    with pytest.raises(InfeasibleError, match="cannot be reached with these candidates"):
        search(net(), batches(), constraint=MaxError(1e-12), cost=AcceleratorCost(SMALL))


def test_recipes_of_no_use():
    def poison(model, recipe, data):
        quantize_(model, recipe, data)
        if recipe.weights == 2:
            model[2].bias.data.fill_(float("nan"))

    words = {"constraint": MaxSize(160), "candidates": [8, 2], "quantize": poison}
    with pytest.raises(DyBitError, match=r"recipe of round 1 cannot be used: the output holds NaN"):
        search(mlp(), mlp_batches(), **words | {"constraint": MaxSize(125)})
    found = search(mlp(), mlp_batches(), **words | {"constraint": MaxSize(500)}, baselines=True)
    assert np.isfinite(found.point.error) and {point.error for point in found.uniform} == {found.point.error, np.inf}


def test_recipes_can_be_tried_in_another_way():
    calls = []

    def quantize(model, recipe, data):
        calls.append((recipe, len(data)))
        quantize_(model, Recipe(weights=8), data)

    result = search(mlp(), mlp_batches(), constraint=MaxSize(200), candidates=[8, 2], quantize=quantize)
    assert calls == [(result.recipe, 2)]


def test_the_recipe_brings_what_candidates_do_not_say():
    recipe = Recipe(group_size=4, activation_mode="dynamic", rules={"head": None})
    result = search(net(), batches(), constraint=MaxSize(2600), recipe=recipe, candidates=["8/8", "4/8"])
    assert result.recipe.layer("head") is None and result.recipe.layer("conv").group_size == 4
    assert "head" not in result.point.choice and np.isfinite(result.point.error)
    assert Candidate(8, 8) in result.problem.candidates
