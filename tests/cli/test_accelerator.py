"""`dybit simulate` and `dybit rtl`: the thin doors to the simulator and the Verilog."""

import csv

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from dybit.accelerator import Config, simulate
from dybit.cli import app
from dybit.cli.accelerator import rtl_command, simulate_command
from dybit.errors import DyBitError
from dybit.workloads.networks import network


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def mlp_batches(split: str, limit: int | None = None) -> list[torch.Tensor]:
    return [torch.zeros(4, 16)]


def named_batches(split: str, limit: int | None = None) -> list[dict[str, torch.Tensor]]:
    return [{"input": torch.zeros(4, 16)}]


HERE = "test_accelerator"


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


def test_the_command_writes_a_file_and_says_what(tmp_path):
    small = Config(rows=2, columns=1, activation_sram=64, weight_sram=64, sum_sram=64)
    (tmp_path / "small.toml").write_text(small.to_toml(), encoding="utf-8")
    told = rtl_command(tmp_path / "a.v", rows=1, config=tmp_path / "small.toml")
    assert "1 x 1 array" in told and "module accelerator(" in (tmp_path / "a.v").read_text(encoding="utf-8")
    with pytest.raises(DyBitError, match="rows must be a positive integer, not 0"):
        rtl_command(tmp_path / "a.v", rows=0)
    with pytest.raises(DyBitError, match="output must be a file that can be written"):
        rtl_command(tmp_path, rows=1, config=tmp_path / "small.toml")


def test_the_table_and_the_totals(tmp_path):
    (tmp_path / "accel.toml").write_text("rows = 16\ncolumns = 16\n", encoding="utf-8")
    table, totals = simulate_command("resnet18", 2, 2, config=tmp_path / "accel.toml", csv=tmp_path / "out.csv")
    config = Config(rows=16, columns=16)
    cost, base = (simulate(network("resnet18"), bits, config) for bits in ((2, 2), (8, 8)))
    assert f"{cost.cycles:,} cycles" in totals
    assert f"speedup {base.cycles / cost.cycles:.2f} over 8/8 bits on the same array" in totals
    assert "first layer at 2/2, last at 2/2" in totals
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    assert "layer4.0.downsample" in captured.get() and "resnet18 on 16 x 16" in captured.get()
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["layer"] for row in rows] == [layer.name for layer in network("resnet18")]
    assert sum(int(row["cycles"]) for row in rows) == cost.cycles
    assert {row["bound"] for row in rows} == {"compute", "memory"}
