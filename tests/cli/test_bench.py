"""Tests of `dybit bench`; none depends on how fast anything is."""

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import invoke

import dybit.measure.timing
from dybit import Recipe
from dybit.measure.timing import Timing

MODEL = ("searched:net", "--data", "searched:batches", "--seconds", "0")


@pytest.fixture(autouse=True)
def place(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support"))


def good(*words):
    result = invoke("bench", *words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def slow(monkeypatch):
    """Makes layers with few weights slower."""

    def compare(runs, seconds):
        for run in runs.values():
            run()
        shape = getattr(getattr(runs["fp32"].func, "__self__", None), "weight", torch.empty(100)).shape
        ratio = 2.0 if shape.numel() > 100 else 0.5
        return {"fp32": Timing(1, 1, 1, 1, 1, 1, 5)} | {
            name: Timing(1 / ratio, 1, 1, ratio, ratio, ratio, 5) for name in list(runs)[1:]
        }

    monkeypatch.setattr(dybit.measure.timing, "compare", compare)


def test_a_model(tmp_path):
    text = good(*MODEL, "--activations", "8", "--json", str(tmp_path / "x.json"))
    assert re.search(r"^conv +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ to", text, re.MULTILINE) and "whole model" in text
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["machine"]["threads"] == torch.get_num_threads() and data["recipe"]["activations"] == 8
    assert data["timings"]["conv"]["dybit"]["rounds"] >= 5 and "whole model" in data["timings"]


def test_slower_layers_can_stay_in_floating_point(tmp_path, slow):
    result = invoke("bench", *MODEL, "--only-if-faster", "-o", str(tmp_path / "r.json"))
    assert result.exit_code == 0 and "layers are slower than in FP32" in result.stderr
    recipe = Recipe.from_json((tmp_path / "r.json").read_text())
    assert recipe.layer("query") is None and recipe.layer("conv").weights == 4
    assert "whole model (only if faster)" in result.stdout and "slower than FP32" in result.stdout


def test_shapes_and_threads():
    before = torch.get_num_threads()
    text = good("--shapes", "1x64x32, 5x16x16", "--seconds", "0", "--activations", "8", "--threads", "1")
    assert "1x64x32" in text and "5x16x16" in text and "whole model" not in text and "1 thread," in text
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "MODEL or --shapes"),
        (("searched:net", "--shapes", "1x2x3"), "either MODEL or --shapes"),
        (("searched:net",), "--data DATA"),
        (("--shapes", "1x2"), "--shapes must be.*'1x2'"),
        (("--shapes", "1x0x2"), "--shapes must be"),
        ((*MODEL, "--only-if-faster"), "-o FILE"),
        ((*MODEL, "-o", "x.json"), "-o FILE needs --only-if-faster"),
        ((*MODEL, "--weights", "none"), "keeps every layer in floating point"),
    ],
)
def test_bad_input(words, message):
    result = invoke("bench", *words)
    assert result.exit_code == 2 and result.stdout == ""
    assert re.search(message, result.stderr.splitlines()[-1]), result.stderr
