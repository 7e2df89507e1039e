"""What of a model is quantized, what is left in floating point, and whether users are told."""

import json
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import dybit
from dybit.errors import DyBitError, DyBitWarning
from dybit.models.coverage import Coverage, Left, measure
from dybit.models.manifest import read_manifest
from dybit.models.plan import plan_layers, quantized_names
from dybit.recipe import Recipe


class Part(nn.Module):
    """A linear layer and something else, of 32 · 32 weights each."""

    def __init__(self, kind):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.other = {
            "bilinear": lambda: nn.Bilinear(4, 8, 32),
            "list": lambda: nn.ParameterList([torch.randn(32, 32)]),
            "max_norm": lambda: nn.Embedding(32, 32, max_norm=1.0),
            "small": lambda: nn.Bilinear(1, 2, 2),
        }[kind]()

    def forward(self, x):
        return self.layer(x)


REASONS = {
    "bilinear": "not a supported kind",
    "list": "a parameter of the model's own code",
    "max_norm": "max_norm changes it",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_is_left_is_warned_of(kind, caplog):
    model = Part(kind)
    size = sum(parameter.numel() for parameter in model.other.parameters() if parameter.ndim > 1)
    share = round(100 * size / (size + 1024))
    told = "'other' keeps floating point" if kind == "max_norm" else f"{share} % of the weights stay"
    with caplog.at_level(logging.INFO, "dybit"), pytest.warns(DyBitWarning, match=told):
        dybit.quantize_(model, Recipe(weights=4))
    (line,) = [record.message for record in caplog.records if "weights are quantized" in record.message]
    assert line.startswith(f"{100 - share} % of {size + 1024:,} weights are quantized")
    assert REASONS[kind] in line and "'other'" in line
    found = measure(model, model._dybit_recipe)
    assert found.quantized == 1024 and found.left == (
        Left("other", type(model.other).__name__, size, REASONS[kind], False),
    )


def test_a_small_share_is_logged_only(caplog):
    with caplog.at_level(logging.INFO, "dybit"):
        dybit.quantize_(Part("small"), Recipe(weights=4))
    assert caplog.records[-1].message.startswith(
        "over 99 % of 1,028 weights are quantized; in floating point: Bilinear"
    )


@pytest.mark.parametrize("pattern", ["other", "re:oth.*"])
def test_a_rule_keeps_without_a_warning(pattern):
    model = dybit.quantize_(Part("bilinear"), Recipe(weights=4, rules={pattern: None}), strict=True)
    assert measure(model, model._dybit_recipe).left[0].asked
    with pytest.raises(DyBitError, match="rule 'other' matches no layer"):
        dybit.quantize_(Part("bilinear"), Recipe(weights=4, rules={"other": {"weights": 8}}))


@pytest.mark.filterwarnings("ignore:layer 'other' keeps")
@pytest.mark.parametrize("kind", REASONS)
def test_strict_refuses_before_anything_is_changed(kind):
    model = Part(kind)
    parametrizations.weight_norm(model.layer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DyBitError, match=f"strict=True, but .* 'other' .*{REASONS[kind]}"):
        dybit.quantize_(model, Recipe(weights=4), strict=True)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.own = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.copy = nn.ParameterList([self.first.weight])
        self.second.weight = self.own.weight

    def forward(self, x):
        return self.own(x)


def test_ties_count_once_and_say_so():
    model = Tied()
    with pytest.warns(DyBitWarning, match="layer 'first' keeps"):
        plans = plan_layers(model, Recipe())
    before = measure(model, Recipe(), quantized_names(plans))
    assert (before.quantized, before.total) == (64, 128)
    assert before.left == (Left("first", "Linear", 64, "tied to a weight that is not quantized", False),)
    with pytest.warns(DyBitWarning, match="layer 'first' keeps"):
        dybit.quantize_(model, Recipe())
    assert measure(model, Recipe()) == before


def test_a_kept_layer_with_a_norm_is_named_by_itself():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), parametrizations.orthogonal(nn.Linear(8, 8)))
    found = measure(model, Recipe(rules={"1": None}), ["0"])
    assert found == Coverage(64, 128, (Left("1", "ParametrizedLinear", 64, "rule '1'", True),))


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    ],
)
def test_a_weight_that_is_made_of_others_counts_once(change):
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    change(model[0])
    planned = quantized_names(plan_layers(model, Recipe()))
    assert measure(model, Recipe(), planned) == Coverage(256, 256, ())
    dybit.quantize_(model, Recipe(), strict=True)
    assert measure(model, Recipe()) == Coverage(256, 256, ())


def test_what_the_recipe_keeps_is_asked_for():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    found = measure(model, Recipe(embeddings=None, rules={"1": {"weights": None, "activations": 8}}), ["2"])
    assert [(part.name, part.reason, part.asked) for part in found.left] == [
        ("0", "the recipe keeps these weights", True),
        ("1", "the recipe keeps these weights", True),
    ]
    assert found.unasked == () and found.quantized == 64
    assert all(not part.asked and part.reason == "not quantized" for part in measure(model).left)


def test_parts_that_are_alike_are_told_of_together():
    left = [Left(f"layers.{i}.experts", "Experts", 100, "not a supported kind", False) for i in range(7)]
    left += [Left(f"x{i}", f"Kind{i}", 10 - i, "not a supported kind", False) for i in range(5)]
    text = str(Coverage.of(1000, left))
    assert "Experts 7 such as 'layers.0.experts' (40 %, not a supported kind), Kind0 'x0' (1 %" in text
    assert text.endswith(", and 2 other kinds")


def test_stored_and_read(tmp_path):
    model = Part("bilinear")
    with pytest.warns(DyBitWarning, match="50 %"):
        dybit.quantize_(model, Recipe())
    dybit.save(model, tmp_path / "q")
    stored = read_manifest(tmp_path / "q").coverage
    assert stored == measure(model, Recipe()) and stored.left[0].name == "other"
    assert read_manifest(dybit.save(dybit.load(tmp_path / "q", Part("bilinear")), tmp_path / "r")).coverage == stored
    data = json.loads((tmp_path / "q" / "dybit.json").read_text())
    del data["coverage"]  # as written by earlier versions
    (tmp_path / "q" / "dybit.json").write_text(json.dumps(data))
    assert read_manifest(tmp_path / "q").coverage is None


@pytest.mark.parametrize(
    "data",
    [
        5,
        {"quantized": 1},
        {"quantized": -1, "total": 1, "left": []},
        {"quantized": True, "total": 1, "left": []},
        {"quantized": 1, "total": 1, "left": {}},
        {"quantized": 1, "total": 1, "left": [5]},
        {"quantized": 1, "total": 1, "left": [{"name": 5, "kind": "", "weights": 1, "reason": "", "asked": True}]},
    ],
)
def test_bad_stored_values(data):
    with pytest.raises(DyBitError, match="coverage"):
        Coverage.from_dict(data)
