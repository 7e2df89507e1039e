"""Tests of chains of post-training algorithms: their validation, their stages, and what each is given."""

import pytest
import torch
from torch import nn

from dybit.errors import DyBitError
from dybit.layers.quantized import Quantized
from dybit.models.plan import plan_layers
from dybit.ptq import chain
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

RECIPE = Recipe(weights=4)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def data():
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.fixture
def made_up(monkeypatch):
    """A transform and two corrections that record how they were called."""
    calls = []

    def record(name):
        def run(*args, progress=None):
            calls.append((name, *args))
            if progress:
                progress(0, 1, "layer")

        return run

    monkeypatch.setitem(chain.ALGORITHMS, "before", chain.transform(record("before")))
    monkeypatch.setitem(chain.ALGORITHMS, "recipes", chain.transform(record("recipes"), by_recipe=True))
    monkeypatch.setitem(chain.ALGORITHMS, "after", chain.correction(record("after")))
    monkeypatch.setitem(chain.ALGORITHMS, "last", chain.correction(record("last")))
    return calls


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (None, ("rtn",)),
        ("rtn", ("rtn",)),
        ([], ("rtn",)),
        ("after", ("rtn", "after")),
        ("before", ("before", "rtn")),
        (["before", "after"], ("before", "rtn", "after")),
        (("recipes", "before", "rtn", "last", "after"), ("recipes", "before", "rtn", "last", "after")),
    ],
)
def test_a_chain_has_a_rounding(made_up, algorithm, expected):
    assert chain.resolve(algorithm, mlp(), calibrated=True) == expected


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("rtm", "algorithm 'rtm' is unknown; did you mean 'rtn'?"),
        ("qqqq", "algorithm 'qqqq' is unknown; known are auto, "),
        (["rtn", 4], "algorithm 4 is unknown"),
        (["rtn", "rtn"], "algorithm 'rtn' is given 2 times in rtn,rtn"),
        (["after", "rtn"], "algorithm 'rtn' must come before 'after', a rounding before a correction"),
        (["rtn", "before"], "algorithm 'before' must come before 'rtn', a transform before a rounding"),
        (["after", "before"], "algorithm 'before' must come before 'after', a transform before a correction"),
    ],
)
def test_bad_chains(made_up, algorithm, message):
    model = mlp()
    with pytest.raises(DyBitError, match=message.replace("?", r"\?")):
        quantize_(model, RECIPE, data(), algorithm=algorithm)
    assert not any(isinstance(module, Quantized) for module in model.modules())


def test_one_rounding_only(monkeypatch):
    monkeypatch.setitem(chain.ALGORITHMS, "other", chain.Algorithm(1, lambda *args, **more: None))
    with pytest.raises(DyBitError, match="2 rounding methods, rtn and other; give one"):
        chain.resolve(["rtn", "other"], mlp(), calibrated=True)


def test_calibration_is_needed(made_up):
    with pytest.raises(DyBitError, match="algorithm 'after' needs calibration; pass calibration=batches"):
        quantize_(mlp(), RECIPE, algorithm="after")
    with pytest.raises(DyBitError, match="calibration yields no batch"):
        quantize_(mlp(), RECIPE, [], algorithm="after")
    with pytest.raises(DyBitError, match="calibration must be an iterable of batches"):
        quantize_(mlp(), RECIPE, torch.ones(2, 8), algorithm="after")


def test_every_stage_gets_what_it_works_on(made_up):
    model, batches = mlp(), data()
    seen = []
    quantize_(
        model,
        RECIPE,
        iter(batches),
        algorithm=["before", "recipes", "rtn", "after", "last"],
        progress=lambda done, total, text: seen.append(text),
    )
    before, recipes, after, last = made_up
    assert before[:3] == ("before", model, ["0", "2"])
    assert list(recipes[2]) == ["0", "2"] and recipes[2]["0"].weights == 4
    assert after[1] is last[1] is model and after[2] is last[2]
    reference = after[2]
    assert [name for name, _ in reference.named_modules()] == [name for name, _ in model.named_modules()]
    assert torch.equal(reference[0].weight, mlp()[0].weight) and isinstance(model[0], Quantized)
    for call in made_up:  # a one-shot iterable serves all
        assert len(call[3]) == 3 and all(torch.equal(a, b) for a, b in zip(call[3], batches, strict=True))
    assert "before: layer" in seen and "last: layer" in seen and seen[-1] == "done"


@pytest.mark.parametrize(
    ("recipe", "convolutions", "others"),
    [
        (Recipe(8, 8), ("rtn", "statistics"), ("gptq",)),
        (Recipe(4, 8), ("rtn", "adaround"), ("gptq",)),
        (Recipe("nf3"), ("rtn", "adaround"), ("gptq",)),
        (Recipe(8, 4), ("rtn", "statistics"), ("smooth", "gptq")),
        (Recipe("s4mid", "s4"), ("rtn", "adaround"), ("smooth", "gptq")),
    ],
)
def test_auto(recipe, convolutions, others):
    norms = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for model, expected in ((norms, convolutions), (mlp(), others)):
        recipes = [plan.recipe for plan in plan_layers(model, recipe)]
        assert chain.resolve("auto", model, recipes, calibrated=False) == ("rtn",)
        assert chain.resolve("auto", model, recipes, calibrated=True) == expected


def test_workdir_is_for_gptq(tmp_path):
    with pytest.raises(DyBitError, match="is for algorithm 'gptq', not for rtn"):
        quantize_(mlp(), RECIPE, data(), workdir=tmp_path)
