"""Tests of `dybit compare`."""

import csv
import math

import pytest
import torch
from command_line import invoke
from safetensors.torch import save_file

from dybit.formats import catalogue


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            "a.weight": torch.randn(40, 96, generator=generator),
            "b.weight": torch.randn(16, 8, 3, 3, generator=generator).bfloat16(),
            "b.bias": torch.randn(16, generator=generator),
            "steps": torch.arange(6).view(2, 3),
        },
        path,
    )
    return str(path)


def test_formats_are_ranked_and_pooled(weights, tmp_path):
    table = tmp_path / "t.csv"
    result = invoke("compare", weights, "--formats", "int4,nf4,dybit4spare,mxfp4", "--csv", str(table))
    assert result.exit_code == 0, result.stderr
    assert "2 tensors, 4,992 weights" in result.stdout
    rows = list(csv.DictReader(table.read_text().splitlines()))
    values = [float(row["sqnr_db"]) for row in rows]
    assert values == sorted(values, reverse=True)
    named = {row["format"]: row for row in rows}
    assert set(named) == {"int4", "nf4", "dybit4spare", "mxfp4", "lloyd4"}
    assert named["lloyd4"]["kind"] == "bound" and named["dybit4spare"]["kind"] == "dybit"
    assert named["mxfp4"]["granularity"] == "group" and named["mxfp4"]["scale"] == "pow2"


@pytest.mark.parametrize("name", ["p.png", "p.svg", "p.html"])
def test_pictures_and_pages(weights, tmp_path, name):
    path = tmp_path / name
    result = invoke("compare", weights, "--group-size", "32", "--formats", "int4,dybit4,nvfp4", "-o", str(path))
    assert result.exit_code == 0, result.stderr
    assert path.stat().st_size > 5000
    if name.endswith("html"):
        text = path.read_text()
        assert text.count("<tr") == 5 and 'class="dybit"' in text and "w.safetensors" in text


def test_all_known_formats_of_a_width():
    result = invoke("compare", "--laplace", "--bits", "3")
    assert result.exit_code == 0, result.stderr
    assert all(family.name in result.stdout for family in catalogue.families(3))


def test_a_module_and_a_glob(tmp_path, monkeypatch):
    (tmp_path / "mine_compare.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(8, 8))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = invoke("compare", "mine_compare:net", "--per-tensor", "--formats", "int4", "--tensors", "0.*")
    assert result.exit_code == 0 and "64 weights" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "exactly one of them"),
        (("--gaussian", "--laplace"), "exactly one of them"),
        (("no.safetensors",), "'no.safetensors' does not exist"),
        (("--gaussian", "--formats", "int4,q7"), "'q7'"),
        (("--gaussian", "--formats", ","), "--formats"),
        (("--gaussian", "--bits", "9"), "bits.*9"),
        (("--gaussian", "--method", "best"), "--method.*'best'"),
        (("--gaussian", "--scale", "int"), "--scale.*'int'"),
        (("--gaussian", "--group-size", "0"), "--group-size 0"),
        (("--gaussian", "-o", "x.pdf"), "--output.*'x.pdf'"),
        (("--gaussian", "-o", "/no/x.png"), "'/no/x.png' does not exist"),
        (("--gaussian", "--csv", "/no/x.csv"), "'/no/x.csv' does not exist"),
        (("{w}", "--tensors", "zz*"), "no tensor that matches 'zz\\*'.*it has for example"),
        (("{w}", "--tensors", "b.bias"), "no floating-point tensor"),
    ],
)
def test_bad_input(weights, words, message):
    result = invoke("compare", *(word.replace("{w}", weights) for word in words))
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    import re

    assert re.search(message, result.stderr), result.stderr


def test_foreign_files_and_bad_weights(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    result = invoke("compare", str(tmp_path / "x.safetensors"))
    assert result.exit_code == 2 and "is not a safetensors file" in result.stderr
    save_file({"w": torch.tensor([[1.0, math.nan]])}, tmp_path / "n.safetensors")
    result = invoke("compare", str(tmp_path / "n.safetensors"))
    assert result.exit_code == 2 and "tensor 'w'" in result.stderr and "nan" in result.stderr
