"""Tests of the accelerator's cost."""

from dybit import AcceleratorCost
from dybit.accelerator import Config, layer_cost
from dybit.mixed_precision.cost import Cost, ShapeCost
from dybit.workloads.networks import network


def test_it_is_the_simulators_figure():
    layer, config = network("resnet18").layers[3], Config(rows=8, columns=8)
    told, cost = AcceleratorCost(config).shape(layer, 4, 8), layer_cost(layer, (4, 8), config)
    assert (told["cost"], told["bound"], told["traffic_bytes"]) == (cost.cycles, cost.bound, cost.traffic.total)
    assert told["compute_cycles"] == cost.compute_cycles and told["memory_cycles"] == cost.memory_cycles


def test_it_has_the_form_that_the_search_asks_for():
    assert isinstance(AcceleratorCost(), ShapeCost) and not isinstance(AcceleratorCost(), Cost)
    assert AcceleratorCost(Config(frequency=1e9)).per_second == 1e9
