"""Tests of cost tables: sizes against saved tensors, cycles against the simulator, times without a clock."""

import copy
import math

import pytest
import torch
from helpers import Tied
from searched import batches, mlp, mlp_batches, net
from torch import nn

import dybit.mixed_precision.cost
from dybit import AcceleratorCost, Candidate, CpuCost, DyBitError, Recipe, SizeCost, quantize_
from dybit.accelerator import Config, simulate
from dybit.layers.description import without_descriptions
from dybit.measure.timing import Timing
from dybit.mixed_precision.candidate import as_candidates
from dybit.mixed_precision.cost import cost_table, shape_table, traced
from dybit.mixed_precision.measured_model import Subject
from dybit.workloads.networks import network

SOME = as_candidates(["8/8", "4/8", "3", "2/2", "fp32"])


def stored(model):
    distinct = {(t.data_ptr(), tuple(t.shape)): t for t in without_descriptions(model.state_dict()).values()}
    return sum(t.nbytes for t in distinct.values())


@pytest.mark.parametrize("recipe", [Recipe(activation_offset=False), Recipe(group_size=4, activation_offset=False)])
def test_sizes_are_those_of_the_quantized_model(recipe):
    subject = Subject(net(), batches(), recipe)
    table = cost_table(SizeCost(), subject, SOME)
    names = list(subject.layers)
    for shift in range(len(SOME)):
        choice = {name: (index + shift) % len(SOME) for index, name in enumerate(names)}
        choice["attention.out_proj"] = choice["attention"]
        made = subject.mixed({name: SOME[index] for name, index in choice.items()})
        assert table.total(choice) == stored(quantize_(net(), made, batches()))
    assert table.total(dict.fromkeys(names, 4)) == stored(net()) == table.base


def test_sizes_of_tied_layers_count_once():
    torch.manual_seed(0)
    data, model = [torch.randint(0, 11, (3, 5))], Tied()
    subject = Subject(model, data, Recipe(activation_offset=False))
    table = cost_table(SizeCost(), subject, SOME)
    choice = {"embedding": 1, "hidden": 0}
    made = subject.mixed({name: SOME[index] for name, index in choice.items()})
    assert table.total(choice) == stored(quantize_(copy.deepcopy(model), made, data))


def test_an_offset_is_counted_as_if_it_were_there():
    subject = Subject(mlp(), mlp_batches())
    choice = dict.fromkeys(subject.layers, 0)
    real = stored(quantize_(mlp(), subject.mixed({name: SOME[0] for name in choice}), mlp_batches()))
    assert 0 <= cost_table(SizeCost(), subject, SOME).total(choice) - real <= 4 * len(choice)


def test_cycles_are_those_of_the_simulator():
    workload, config = network("mobilenet_v2"), Config(rows=16, columns=16)
    names = [layer.name for layer in workload][:20]
    table = shape_table(AcceleratorCost(config), workload, SOME, names)
    choice = {name: index % 2 for index, name in enumerate(names)}
    bits = {"*": (8, 8)} | {name: SOME[index].bits for name, index in choice.items()}
    assert table.total(choice) == simulate(workload, bits, config).cycles
    assert table.base == simulate(workload, (8, 8), config).cycles
    assert table.layers[names[0]][2] == table.layers[names[0]][4] == math.inf
    assert table.details[names[0]][0]["bound"] in ("compute", "memory") and not table.details[names[0]][4]


def test_a_traced_model():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            x = self.layer(self.layer(x))
            return x @ x.transpose(1, 2)

    subject = Subject(Twice(), [torch.randn(1, 5, 8)])
    table = cost_table(AcceleratorCost(), subject, SOME)
    cost = simulate(traced(subject), (8, 8))
    assert table.layers["layer"][0] == cost.layers[0].cycles + cost.layers[1].cycles
    assert table.fixed == cost.layers[2].cycles and table.base == cost.cycles


def test_heads_tied_to_a_table_cost_what_they_multiply():
    torch.manual_seed(0)
    table = cost_table(AcceleratorCost(), Subject(Tied(), [torch.randint(0, 11, (3, 5))]), SOME)
    assert table.layers["embedding"][0] > 0 and table.fixed == 0


def test_cpu_times_add_up(tmp_path, monkeypatch):
    calls = []

    def compare(contestants, seconds):
        calls.append(list(contestants))
        for run in contestants.values():
            run()
        times = {"fp32": 3.0, "model": 10.0}
        return {name: Timing(times.get(name, 1.5), 0, 0, 3.0 / times.get(name, 1.5), 0, 0, 5) for name in contestants}

    monkeypatch.setattr(dybit.mixed_precision.cost, "compare", compare)
    subject, steps = Subject(mlp(), mlp_batches()), []
    table = CpuCost(cache=tmp_path).table(subject, SOME, lambda *step: steps.append(step))
    assert table.layers["0"] == (1.5, 1.5, 1.5, 1.5, 3.0) and table.base == 10 and table.fixed == 4
    assert table.per_second == 1 and len(steps) == 3 and calls[-1] == ["model"] and len(calls) == 3
    calls.clear()
    assert CpuCost(cache=tmp_path).table(subject, SOME).layers == table.layers and calls == [["model"]]
    CpuCost(cache=tmp_path).table(subject, SOME[:2])
    assert len(calls) == 4
    next(tmp_path.iterdir()).write_text("{}")
    CpuCost(cache=tmp_path).table(subject, SOME)


def test_cpu_times_are_measured(tmp_path):
    subject = Subject(net(), batches())
    table = CpuCost(seconds=0.001, cache=tmp_path).table(subject, SOME[:2])
    assert all(0 < cost < 10 for row in table.layers.values() for cost in row) and table.base > 0
    assert "threads" in table.note or "thread" in table.note


def test_what_is_no_cost():
    with pytest.raises(DyBitError, match="cost must be"):
        cost_table("cpu", Subject(mlp(), mlp_batches()), (Candidate(4),))
