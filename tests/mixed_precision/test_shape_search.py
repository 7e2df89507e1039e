"""Tests of searching by shapes: speedups are met on the simulator, and no random recipe is better."""

import itertools

import numpy as np
import pytest

from dybit import AcceleratorCost, Candidate, DyBitError, MaxDrop, MaxError, MaxSize, Recipe, SizeCost, Speedup
from dybit.accelerator import simulate
from dybit.mixed_precision.knapsack import InfeasibleError
from dybit.mixed_precision.shape_search import gaussian_noise, search_shapes, shape_errors
from dybit.workloads.networks import network

NAMES = ("resnet18", "resnet50", "mobilenet_v2", "vit_b_16")


def bits(result):
    return {name: candidate.bits for name, candidate in result.problem.layers(result.point.choice).items()}


@pytest.mark.parametrize(
    ("name", "speedup"),
    [
        ("resnet50", 2.5),
        ("resnet50", 4.0),
        ("resnet50", 8.1),
        ("resnet18", 4.0),
        ("mobilenet_v2", 2.5),
        ("vit_b_16", 6.0),
    ],
)
def test_speedups_are_met_and_nothing_random_is_better(name, speedup):
    workload = network(name)
    result = search_shapes(workload, constraint=Speedup(speedup), cost=AcceleratorCost())
    assert simulate(workload, (8, 8)).cycles / simulate(workload, bits(result)).cycles >= speedup
    table = np.array([result.problem.main.layers[layer.name] for layer in workload])
    errors = np.array([result.problem.errors[layer.name] for layer in workload])
    rng, rows = np.random.default_rng(0), np.arange(len(table))
    limit = result.problem.main.base / speedup
    best = np.inf
    for _ in range(10_000):
        # Around the answer, where random recipes have a chance: some layers changed at random.
        choice = np.array([result.point.choice[layer.name] for layer in workload])
        changed = rng.integers(1, 1 + len(choice) // 2)
        choice[rng.choice(len(choice), changed, replace=False)] = rng.integers(0, table.shape[1], changed)
        if table[rows, choice].sum() <= limit:
            best = min(best, errors[rows, choice].sum())
    assert result.point.estimated_error <= best * (1 + 1e-9)


def test_baselines_are_never_better():
    result = search_shapes(network("resnet50"), constraint=Speedup(4.0), cost=AcceleratorCost(), pareto=22)
    assert result.greedy.estimated_error >= result.point.estimated_error
    assert len(result.pareto) >= 20 and len(result.uniform) == 7
    for point in result.uniform:
        front = [p for p in result.pareto if p.speedups["accelerator"] >= point.speedups["accelerator"]]
        assert not front or min(p.estimated_error for p in front[:1]) <= 1.6 * point.estimated_error
        same = search_shapes(
            network("resnet50"), constraint=Speedup(point.speedups["accelerator"] * (1 - 1e-9)), cost=AcceleratorCost()
        )
        assert same.point.estimated_error <= point.estimated_error * (1 + 1e-9)


def test_recipes_name_every_layer():
    workload = network("mobilenet_v2")
    result = search_shapes(workload, constraint=Speedup(2.0), cost=AcceleratorCost())
    for layer in workload:
        found = result.recipe.layer(layer.name)
        assert (found.weights, found.activations) == bits(result)[layer.name]


def test_gaussian_noise_is_that_of_a_large_sample():
    noise = gaussian_noise(Candidate(4, 8), Recipe())
    # dybit4spare and signed 8-bit DyBit on a Gaussian: about 20 and 40 dB.
    assert 18.5 < -10 * np.log10(noise[0]) < 21.5 and 35 < -10 * np.log10(noise[1]) < 45
    assert gaussian_noise(Candidate(None), Recipe()) == (0.0, 0.0)
    widths = [gaussian_noise(Candidate(b, b), Recipe()) for b in (8, 6, 4, 3, 2)]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(widths))


def test_errors_are_shares():
    workload, recipe = network("vit_b_16"), Recipe()
    errors = shape_errors(workload, [Candidate(4, 8)], recipe)
    weights, inputs = gaussian_noise(Candidate(4, 8), recipe)
    scores = next(layer for layer in workload if layer.dynamic)
    assert errors[scores.name] == [pytest.approx(2 * inputs * scores.macs / workload.macs)]
    total = sum(row[0] for row in errors.values())
    dynamic = sum(layer.macs for layer in workload if layer.dynamic) / workload.macs
    assert total == pytest.approx(weights + inputs * (1 + dynamic), rel=1e-6)


def test_sizes():
    result = search_shapes(network("resnet18"), constraint=MaxSize(6e6), cost=AcceleratorCost())
    assert result.point.costs["size"] <= 6e6
    with pytest.raises(InfeasibleError, match="size of 1 bytes"):
        search_shapes(network("resnet18"), constraint=MaxSize(1), cost=AcceleratorCost())


def test_bad_arguments():
    work = network("resnet18")
    for constraint in (MaxError(1), MaxDrop(1)):
        with pytest.raises(DyBitError, match="needs a model with weights"):
            search_shapes(work, constraint=constraint, cost=AcceleratorCost())
    with pytest.raises(DyBitError, match="cost must know shapes"):
        search_shapes(work, constraint=Speedup(2), cost=SizeCost())
    with pytest.raises(InfeasibleError, match=r"speedup of 9 .*it is 8\.\d"):
        search_shapes(work, constraint=Speedup(9), cost=AcceleratorCost())
