"""Tests of subjects: the copy, its layers, groups, twins, and the judge against fidelity."""

import copy
import math

import pytest
import torch
from helpers import Tied, build, inputs
from searched import batches, mlp, mlp_batches, net
from torch import nn

from dybit import Candidate, DyBitError, DyBitWarning, Recipe, quantize_
from dybit.layers.quantized import Quantized
from dybit.measure.fidelity import compare_models
from dybit.mixed_precision.estimators import Twins
from dybit.mixed_precision.measured_model import Judge, Subject, agree


def test_the_model_is_left_alone_and_the_copy_is_the_same_function():
    model, before = net(), copy.deepcopy(net().state_dict())
    subject = Subject(model, batches())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert isinstance(subject.model.norm, nn.Identity) and isinstance(model.norm, nn.BatchNorm2d)
    torch.testing.assert_close(subject.model(batches()[0]), model(batches()[0]))


def test_layers_and_groups_by_shared_input():
    subject = Subject(net(), batches())
    assert list(subject.layers)[:3] == ["conv", "blocks.0.0", "blocks.0.2"] and len(subject.layers) == 10
    groups = subject.groups()
    assert ("query", "key") in groups and ("attention", "attention.out_proj") in groups and len(groups) == 8
    assert len(subject.groups(shared_inputs=False)) == 9
    assert subject.inputs["attention.out_proj"].shape[-1] == 8


def test_groups_by_pattern():
    subject = Subject(net(), batches())
    assert ("blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2") in subject.groups(["blocks.*"])
    by_block = subject.groups([r"re:blocks\.(\d)\..*"])
    assert ("blocks.0.0", "blocks.0.2") in by_block and ("blocks.1.0", "blocks.1.2") in by_block
    joined = subject.groups(["key", "re:key|head"])
    assert ("query", "key", "head") in joined
    for bad, message in (("nothing*", "matches no layer"), ("re:(", "not a regular expression")):
        with pytest.raises(DyBitError, match=message):
            subject.groups([bad])
    assert agree("abc") == [("a",), ("b",), ("c",)]


def test_an_input_that_was_written_to_is_another_one():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            x += 1
            return y + self.b(x)

    assert Subject(Writes(), [torch.zeros(2, 4)]).groups() == [("a",), ("b",)]


def test_tied_layers_are_one():
    torch.manual_seed(0)
    data = [torch.randint(0, 11, (3, 5))]
    subject = Subject(Tied(), data)
    assert list(subject.layers) == ["embedding", "hidden"] and subject.ties["embedding"] == ("head",)
    recipe = subject.mixed({"embedding": Candidate(4, 8), "hidden": Candidate(2)})
    assert recipe.layer("embedding", "embedding").weights == 4 and recipe.layer("head").activations == 8
    with subject.replaced(
        {n: subject.quantized(n, r) for n, r in subject.layer_recipes("embedding", Candidate(4)).items()}
    ):
        assert isinstance(subject.model.head, Quantized) and isinstance(subject.model.embedding, Quantized)
    assert type(subject.model.head) is nn.Linear


def test_rules_of_none_keep_layers_out():
    subject = Subject(net(), batches(), Recipe(rules={"conv": None, "query": {"group_size": 4}}))
    assert "conv" not in subject.layers
    assert subject.mixed(dict.fromkeys(subject.layers, Candidate(4))).layer("conv") is None
    assert subject.layer_recipes("query", Candidate(3))["query"].group_size == 4


@pytest.mark.parametrize("name", ["linear", "conv2d", "attention", "embedding", "transposed2d", "tied"])
@pytest.mark.parametrize("candidate", [Candidate(4), Candidate(4, 8)], ids=str)
def test_twins_are_what_quantize_makes(name, candidate):
    model, data = build(name), [inputs(name)]
    subject = Subject(model, data)
    recipe = subject.mixed(dict.fromkeys(subject.layers, candidate))
    expected = quantize_(copy.deepcopy(model), recipe, data)
    made = Twins(subject)
    twins = {one: twin for first in subject.layers for one, twin in made.of(first, candidate).items()}
    with torch.no_grad(), subject.replaced(twins) as replaced:
        torch.testing.assert_close(replaced(*data[0]), expected(*data[0]))
    with torch.no_grad():
        torch.testing.assert_close(subject.model(*data[0]), model(*data[0]))


def test_replaced_layers_come_back_after_an_error():
    subject = Subject(mlp(), mlp_batches())
    twin = subject.quantized("0", Recipe(weights=2).layer("0"))
    with pytest.raises(RuntimeError, match="stop"), subject.replaced({"0": twin}):
        raise RuntimeError("stop")
    assert type(subject.model[0]) is nn.Linear and "weight" in subject.model[0]._parameters


def test_the_judge_agrees_with_fidelity():
    quantized = quantize_(mlp(), Recipe(weights=3))
    data = mlp_batches()
    assert Judge(mlp(), data).error(quantized) == pytest.approx(compare_models(mlp(), quantized, data).kl, rel=1e-6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    images = batches()
    rounded = quantize_(copy.deepcopy(model), Recipe(weights=3))
    judge = Judge(model, images)
    expected = 10 ** (-compare_models(model, rounded, images).sqnr / 10)
    assert judge.error(rounded) == pytest.approx(expected) and "noise" in judge.unit
    assert judge.error(model) == 0


def test_signatures_tell_weights_and_data_apart():
    first = Subject(mlp(), mlp_batches()).signature
    assert Subject(mlp(), mlp_batches()).signature == first
    other = mlp()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-3
    assert Subject(other, mlp_batches()).signature != first
    assert Subject(mlp(), mlp_batches("evaluation")).signature != first
    assert Subject(mlp(), mlp_batches()[:1]).signature != first


def test_layers_that_never_run():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    subject = Subject(Lazy(), [torch.randn(3, 4)])
    with pytest.warns(DyBitWarning, match="never reached 1 layers.*unused"):
        assert not subject.statistics["unused"].seen
    assert subject.groups() == [("used",), ("unused",)]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (mlp(), [], "batches.*empty"),
        (mlp(), torch.zeros(2, 6), "iterable of batches"),
        (nn.ReLU(), [torch.zeros(1)], "no layer that can be quantized"),
        ("model", [torch.zeros(1)], "torch.nn.Module"),
        (quantize_(mlp(), Recipe()), [torch.zeros(1)], "already quantized"),
    ],
)
def test_bad_input(model, data, message):
    with pytest.raises(DyBitError, match=message):
        Subject(model, data)


def test_a_judge_needs_finite_outputs():
    model = mlp()
    with torch.no_grad():
        model[2].bias.fill_(math.nan)
    with pytest.raises(DyBitError, match="original's output for batch 0 holds NaN"):
        Judge(model, mlp_batches())
    with pytest.raises(DyBitError, match="output holds NaN"):
        Judge(mlp(), mlp_batches()).error(model)
