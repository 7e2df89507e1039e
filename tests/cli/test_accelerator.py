"""`dybit simulate` and `dybit rtl`: the thin doors to the simulator and the Verilog."""

import csv

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dybit.accelerator import Config
from dybit.cli import app


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def mlp_batches(split: str, limit: int | None = None) -> list[torch.Tensor]:
    return [torch.zeros(4, 16)]


def named_batches(split: str, limit: int | None = None) -> list[dict[str, torch.Tensor]]:
    return [{"input": torch.zeros(4, 16)}]


HERE = "test_cli_accelerator"


@pytest.fixture(autouse=True)
def _importable(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.path.parent))


def invoke(*words: str):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "160"})


def test_a_built_in_network():
    result = invoke("simulate", "resnet18", "--weights", "2", "--activations", "4")
    assert result.exit_code == 0 and "layer4.0.downsample" in result.stdout
    assert "over 8/8 bits" in result.stdout and "first layer at 2/4" in result.stdout


@pytest.mark.parametrize("batches", ["mlp_batches", "named_batches"])
def test_a_torch_model_is_traced(tmp_path, batches):
    path = tmp_path / "layers.csv"
    result = invoke("simulate", f"{HERE}:mlp", "--data", f"{HERE}:{batches}", "--csv", str(path))
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [(row["m"], row["k"], row["n"]) for row in rows] == [("4", "16", "32"), ("4", "32", "8")]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("resnet5",), "did you mean 'resnet50'"),
        (("resnet50", "--weights", "9"), "9"),
        (("resnet50", "--data", f"{HERE}:mlp_batches"), "is not module:function"),
        ((f"{HERE}:mlp",), "--data module:function"),
        (("resnet50", "--config", "/nowhere.toml"), "/nowhere.toml"),
        ((f"{HERE}:mlp", "--data", f"{HERE}:nothing"), "nothing"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence):
    result = invoke("simulate", *words)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and sentence in result.stderr


def test_verilog_of_a_small_array(tmp_path):
    small = Config(rows=2, columns=1, activation_sram=64, weight_sram=64, sum_sram=64)
    (tmp_path / "small.toml").write_text(small.to_toml(), encoding="utf-8")
    path = tmp_path / "array.v"
    result = invoke("rtl", "--rows", "1", "--config", str(tmp_path / "small.toml"), "-o", str(path))
    assert result.exit_code == 0, result.output
    text = path.read_text(encoding="utf-8")
    assert "module accelerator(" in text and "1 x 1 array" in result.stdout


@pytest.mark.parametrize("words", [("--rows", "0"), ("--cols", "-1"), ("--config", "/nowhere.toml")])
def test_bad_arrays_write_nothing(tmp_path, words):
    path = tmp_path / "array.v"
    result = invoke("rtl", "-o", str(path), *words)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and not path.exists()
