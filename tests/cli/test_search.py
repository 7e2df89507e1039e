"""Tests of `dybit search`."""

import json
import re
from pathlib import Path

import pytest
from command_line import invoke

from dybit import DyBitError, Recipe
from dybit.cli.search import parse_bytes

MODEL = ("searched:mlp", "--calibration", "searched:mlp_batches")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DYBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support"))


def good(*words):
    result = invoke("search", *words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_speedup_on_the_accelerator(tmp_path):
    run = str(tmp_path / "run")
    text = good(*MODEL, "--speedup", "1.01", "--candidates", "8/8, 4/8,2/2", "-o", run)
    assert re.search(r"^0 +W\dA\d .*(compute|memory)", text, re.MULTILINE) and "the search" in text
    data = json.loads(Path(run, "search.json").read_text())
    assert data["model"] == "searched:mlp" and data["result"]["speedups"]["accelerator"] >= 1.01
    recipe = Recipe.from_json(Path(run, "recipe.json").read_text())
    quantized = invoke("quantize", *MODEL, "--recipe", f"{run}/recipe.json", "-o", str(tmp_path / "q"))
    assert quantized.exit_code == 0, quantized.stderr
    assert recipe.weights in (8, 4, 2)


def test_a_size_with_a_front(tmp_path):
    words = ("--on", "size", "--candidates", "8,6,4,3,2", "--pareto", "--points", "5", "-o", str(tmp_path / "run"))
    text = good(*MODEL, "--max-size", "0.2 kB", *words)
    assert text.count("pareto 0") == 5 and "uniform W4" in text
    assert len(list((tmp_path / "run" / "pareto").iterdir())) == 5


def test_losses():
    text = good(*MODEL, "--max-error", "0.001", "--on", "size", "--candidates", "8,4,2")
    assert "KL divergence" in text
    text = good(*MODEL, "--max-drop", "5", "--evaluate", "searched:score", "--on", "size", "--candidates", "8,4,2")
    assert "drop" in text
    good(*MODEL, "--max-drop", "10", "--on", "size", "--candidates", "8,4", "--sensitivity", "rmse", "--baselines")


def test_on_this_machine():
    text = good(*MODEL, "--speedup", "0.01", "--on", "cpu", "--candidates", "fp32,8/8", "--group", "*")
    assert "measured on" in text and " ms" in text and "FP32" in text


def test_shapes(tmp_path):
    text = good("--workload", "resnet18", "--speedup", "4", "-o", str(tmp_path / "run"))
    assert "SHAPES ONLY" in text and "greedy" in text
    (tmp_path / "small.toml").write_text("rows = 16\ncolumns = 16\n")
    other = good("--workload", "resnet18", "--speedup", "4", "--config", str(tmp_path / "small.toml"))
    assert other != text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "MODEL or --workload"),
        (("searched:mlp", "--workload", "resnet18", "--speedup", "2"), "either MODEL or --workload"),
        ((*MODEL,), "--speedup, --max-error, --max-drop and --max-size"),
        (("searched:mlp", "--speedup", "2"), "--calibration DATA is needed"),
        ((*MODEL, "--speedup", "99"), "speedup of 99 .*cannot be reached"),
        ((*MODEL, "--speedup", "-1"), "times of Speedup"),
        ((*MODEL, "--speedup", "2", "--on", "gpu"), "--on must be.*'gpu'"),
        ((*MODEL, "--speedup", "2", "--on", "cpu", "--config", "x.toml"), "--config 'x.toml'"),
        ((*MODEL, "--max-size", "big"), "--max-size.*'big'"),
        ((*MODEL, "--max-size", "1kB", "--evaluate", "searched:score"), "needs --max-drop"),
        ((*MODEL, "--max-drop", "1", "--evaluate", "x"), "module:function, not 'x'"),
        ((*MODEL, "--max-drop", "1", "--evaluate", "searched:nothing"), "no function 'nothing'"),
        ((*MODEL, "--speedup", "2", "--candidates", "4/8,q"), "'q'"),
        ((*MODEL, "--speedup", "2", "--sensitivity", "q"), "sensitivity must be one of.*'q'"),
        ((*MODEL, "--speedup", "2", "-o", str(Path(__file__).parent)), "not empty"),
        (("--workload", "resnet51", "--speedup", "2"), "resnet50"),
        (("--workload", "resnet18", "--max-error", "2"), "needs a model"),
        (("--workload", "resnet18", "--speedup", "2", "--on", "cpu"), "cost must know shapes"),
        (("--workload", "resnet18", "--speedup", "2", "--calibration", "x:y"), "--calibration 'x:y' needs a model"),
    ],
)
def test_bad_input(words, message):
    result = invoke("search", *words)
    assert result.exit_code == 2 and result.stdout == ""
    assert re.search(message, result.stderr.splitlines()[-1]), result.stderr


@pytest.mark.parametrize(
    ("word", "count"), [("25MB", 25e6), ("800 kB", 8e5), ("1.5GiB", 1.5 * 2**30), ("2e6", 2e6), ("77 b", 77)]
)
def test_bytes(word, count):
    assert parse_bytes(word) == count


@pytest.mark.parametrize("word", ["", "MB", "1.2.3MB", "5 tons", "-4"])
def test_bad_bytes(word):
    with pytest.raises(DyBitError, match="--max-size"):
        parse_bytes(word)
