"""Tests of `dybit export` and `dybit import`."""

import os
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import invoke

import dybit

MODULE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10)).eval()

def blocks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU()).eval()

def other():
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 9)).eval()

def named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(24, 32), nn.Linear(32, 10)
    return Net().eval()

def data(split="calibration"):
    torch.manual_seed(split == "evaluation")
    return [torch.randn(16, 24) for _ in range(2)]
"""
DATA = ("--calibration", "theirs:data")


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    (folder / "theirs.py").write_text(MODULE)
    before = os.getcwd()  # noqa: PTH109
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.modules.pop("theirs", None)  # other tests have another module of that name
    yield folder
    sys.modules.pop("theirs", None)
    sys.path.remove(str(folder))
    os.chdir(before)


def good(*words):
    result = invoke(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def bad(*words):
    result = invoke(*words)
    assert result.exit_code == 2 and result.stderr.count("\n") <= 3, result.stderr
    return result.stderr


def test_a_model_and_its_checkpoint_give_the_same_file(place):
    text = good("export", "theirs:net", "-o", "a.onnx", "--weights", "4", *DATA)
    assert "2 × 4-bit codes" in text and "largest difference" in text and "input [batch, 24]" in text
    good("quantize", "theirs:net", "-o", "saved", "--weights", "4", *DATA)
    good("export", "saved", "--model", "theirs:net", "-o", "b.onnx", *DATA)
    assert (place / "a.onnx").read_bytes() == (place / "b.onnx").read_bytes()
    from theirs import data, net

    model, x = dybit.load("saved", net()), data("evaluation")[0]
    (y,) = onnxruntime.InferenceSession("a.onnx").run(None, {"input": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(y, model(x).numpy(), atol=1e-5)


def test_fp4_says_what_cannot_run_it():
    result = invoke("export", "theirs:net", "-o", "fp4.onnx", "--preset", "fp4", "--weights", "s4r2", *DATA)
    assert result.exit_code == 0 and "does not compute FLOAT4E2M1" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("theirs:net", "--preset", "small"),
            "--preset must be one of portable, fast-cpu, fp4, compressed-tensors, gguf, not 'small'",
        ),
        (("theirs:net", "--model", "theirs:net"), "needs a checkpoint, but 'theirs:net' is not one"),
        (("theirs:net", "--weights", "4", "--preset", "fp4"), "needs a weight of E2M1 values"),
        (("saved2", "--model", "theirs:net", "--weights", "3"), "--weights cannot be used with 'saved2'"),
        (("saved2",), "name its floating-point original by --model"),
    ],
)
def test_errors_of_export(place, words, message):
    if not (place / "saved2").exists():
        good("quantize", "theirs:net", "-o", "saved2")
    assert message in " ".join(bad("export", *words, "-o", "none.onnx", *DATA).split())
    assert not (place / "none.onnx").exists()


def test_import_into_a_model(place):
    good("export", "theirs:net", "-o", "int.onnx", "--preset", "fast-cpu", "--weights", "s8r1", *DATA)
    text = good("import", "int.onnx", "-o", "back", "--model", "theirs:net")
    assert "2 weights as s8r1" in text
    from theirs import data, net

    model = dybit.quantize_(net(), dybit.Recipe(weights="s8r1"), calibration=data())
    loaded = dybit.load("back", net())
    assert torch.equal(loaded[0].weight, model[0].weight) and torch.equal(loaded[2].bias, model[2].bias)
    assert "s8r1" in good("info", "back")
    good("import", "int.onnx", "-o", "without")
    assert (place / "without" / "dybit.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none.onnx",), "'none.onnx' cannot be read"),
        (("theirs.py",), "is not a valid ONNX model"),
        (("ok.onnx", "--model", "theirs:other"), "does not fit the model"),
        (("ok.onnx", "--model", "theirs:named"), "--model 'theirs:named' has no weight '0.weight'"),
    ],
)
def test_errors_of_import(place, words, message):
    if not (place / "ok.onnx").exists():
        good("export", "theirs:net", "-o", "ok.onnx", "--preset", "fast-cpu", "--weights", "s8r1", *DATA)
    assert message in " ".join(bad("import", *words, "-o", "nothing").split())
    assert not (place / "nothing").exists()


@pytest.mark.parametrize(("preset", "path"), [("compressed-tensors", "ct"), ("gguf", "w.gguf")])
def test_block_formats_there_and_back(place, preset, path):
    pytest.importorskip("gguf")
    words = ("--weights", "s4r2", "--group-size", "32", "--scale", "pow2")
    good("export", "theirs:blocks", "-o", path, "--preset", preset, *words)
    good("import", path, "-o", f"{preset}-back", "--model", "theirs:blocks")
    from theirs import blocks

    model = dybit.quantize_(blocks(), dybit.Recipe(weights="s4r2", group_size=32, scale="pow2"))
    loaded = dybit.load(f"{preset}-back", blocks())
    assert torch.equal(loaded[0].weight, model[0].weight) and torch.equal(loaded[0].bias, model[0].bias)


def test_onnx_needs_inputs():
    assert "--preset portable needs --calibration" in " ".join(bad("export", "theirs:net", "-o", "x.onnx").split())
