"""Tests of `dybit bench`; none depends on how fast anything is."""

import importlib
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


PEERS = ("searched:mlp", "--data", "searched:mlp_batches", "--seconds", "0", "--peers")


def test_peers(tmp_path, monkeypatch):
    monkeypatch.setitem(importlib.import_module("dybit.onnx.peers")._PACKAGES, "OpenVINO", (("no_such_package",), ()))
    result = invoke("bench", *PEERS, "--calibration", "searched:mlp_batches", "--json", str(tmp_path / "x.json"))
    assert result.exit_code == 0, result.stderr
    for kind in ("FP32", "INT8"):
        assert f"whole model (ONNX Runtime {kind})" in result.stdout
        assert f"OpenVINO {kind} is left out: no_such_package not installed" in result.stderr
    timings = json.loads((tmp_path / "x.json").read_text())["timings"]
    assert set(timings["whole model"]) == {"fp32", "dybit", "fused", "ONNX Runtime FP32", "ONNX Runtime INT8"}
    assert set(timings["0"]) == {"fp32", "dybit"}
    assert "INT8" not in good(*PEERS)


def test_no_peer_is_installed(monkeypatch):
    packages = {"ONNX Runtime": (("no_such_package",), ()), "OpenVINO": (("no_such_package",), ())}
    monkeypatch.setattr(importlib.import_module("dybit.onnx.peers"), "_PACKAGES", packages)
    result = invoke("bench", *PEERS)
    assert result.exit_code == 2 and "neither is installed" in result.stderr.splitlines()[-1]


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
        (("--shapes", "1x2x3", "--peers"), "--peers needs MODEL"),
        ((*MODEL, "--calibration", "searched:batches"), "--calibration DATA needs --peers"),
        ((*MODEL, "-o", "x.json"), "-o FILE needs --only-if-faster"),
        ((*MODEL, "--weights", "none"), "keeps every layer in floating point"),
    ],
)
def test_bad_input(words, message):
    result = invoke("bench", *words)
    assert result.exit_code == 2 and result.stdout == ""
    assert re.search(message, result.stderr.splitlines()[-1]), result.stderr
