"""Tests of the ONNX export: every kind of layer under every preset, checked by ONNX Runtime against the model."""

import copy

import pytest
import torch
from helpers import build, inputs
from onnx_writer_cases import EXACT, ROUNDED, exported
from torch import nn

import dybit
import onnx
from dybit import Recipe, quantize_
from dybit.errors import DyBitError
from dybit.onnx import export, writer


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("linear", {"activations": "s8"}),
        ("linear", {"activations": "u8r3", "activation_offset": True}),
        ("linear", {"activations": "nf4"}),
        ("linear_no_bias", {"activations": 6, "activation_mode": "dynamic", "activation_group_size": 5}),
        ("conv2d_unbatched", {"activations": 8, "activation_mode": "dynamic"}),
        ("attention", {"activations": 8, "activation_mode": "dynamic"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rounded_inputs(tmp_path, name, fields):
    assert exported(tmp_path, name, **fields).check.difference < EXACT


@pytest.mark.parametrize(
    ("name", "stored", "fields"),
    [
        ("linear", {"MatMulNBits": 1}, {"weights": 4}),
        ("linear_no_bias", {"MatMulNBits": 1}, {"weights": "int4", "group_size": 16}),
        ("linear", {"8-bit codes": 1}, {"weights": "s8"}),
        (
            "linear",
            {"int8": 1},
            {"weights": 5, "activations": "int8", "activation_mode": "static", "activation_offset": False},
        ),
        ("conv2d", {"int8": 1}, {"weights": 4, "activations": "uint8", "activation_offset": False}),
        ("conv2d", {"4-bit codes": 1}, {"weights": 4}),
        ("conv2d", {"8-bit codes": 1}, {"weights": "s8", "activations": "uint8", "activation_offset": False}),
        ("transposed2d", {"4-bit codes": 1}, {"weights": 4, "activations": "int8", "activation_offset": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fast_cpu(tmp_path, name, stored, fields):
    done = exported(tmp_path, name, preset="fast-cpu", **fields)
    assert done.stored == stored
    assert done.check.difference < (ROUNDED if "MatMulNBits" in stored else EXACT)
    kinds = {node.op_type for node in onnx.load(done.path).graph.node}
    assert ("QuantizeLinear" in kinds) == ("int8" in stored)


def test_half_precision(tmp_path):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU()).half()
    quantize_(model, Recipe(weights=4, activations="s8"), calibration=[torch.randn(4, 8).half()])
    done = export(model, tmp_path / "m.onnx", [torch.randn(4, 8).half()], bound=2e-3)  # sums of half precision
    assert done.stored == {"4-bit codes": 1}


def test_the_file_is_small_and_says_nothing_about_where_it_was_made(tmp_path):
    model = quantize_(nn.Sequential(nn.Linear(512, 512)), Recipe(weights=4))
    done = export(model, tmp_path / "m.onnx", [torch.randn(2, 512)])
    data = done.path.read_bytes()
    assert done.nbytes == len(data) < 0.14 * 4 * 512 * 512
    assert b".py" not in data and b"torch" not in data
    assert {tensor.name for tensor in onnx.load(done.path).graph.initializer} >= {"0.weight.codes", "0.bias"}


def test_two_gigabytes_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_LIMIT", 10)
    with pytest.raises(DyBitError, match="ONNX holds 2 GB in one file"):
        export(quantize_(build("linear"), Recipe(weights=4)), tmp_path / "m.onnx", [inputs("linear")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "fast"}, "preset must be one of portable, fast-cpu, fp4, not 'fast'"),
        ({"bound": -1}, "bound must be a number of at least 0, not -1"),
        ({"batches": []}, "batches must be a list of at least one batch"),
        ({"batches": torch.ones(2, 19)}, "batches must be a list"),
        ({"model": nn.Linear(19, 6)}, "with quantized layers, not Linear"),
        ({"path": "nowhere/m.onnx"}, "in no existing directory"),
        ({"batches": [torch.ones(2, 3)]}, "x must have 19 columns"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(tmp_path, change, message):
    model = quantize_(build("linear"), Recipe(weights=4))
    arguments = {"model": model, "path": tmp_path / "m.onnx", "batches": [torch.ones(2, 19)]} | change
    with pytest.raises(DyBitError, match=message):
        export(arguments.pop("model"), arguments.pop("path"), arguments.pop("batches"), **arguments)
    assert dybit.onnx.PRESETS == ("portable", "fast-cpu", "fp4")


@pytest.mark.parametrize(
    ("layer", "activations", "reason"),
    [
        (nn.EmbeddingBag(20, 8), None, "'0', a EmbeddingBag with quantized weights"),
        (nn.LSTM(8, 8), 8, "'0', a LSTM with rounded inputs"),
        (nn.GRUCell(8, 8), 8, "'0', a GRUCell with rounded inputs"),
        (nn.LSTM(8, 16, proj_size=8), None, "'0', a LSTM with projections"),
    ],
    ids=["bag", "lstm", "cell", "projections"],
)
def test_what_onnx_has_nothing_for_is_refused_before_any_work(tmp_path, monkeypatch, layer, activations, reason):
    recipe = Recipe(weights=4, activations=activations, activation_mode="dynamic")
    model = quantize_(nn.Sequential(copy.deepcopy(layer)), recipe)
    monkeypatch.setattr("dybit.onnx.capture.capture", lambda *_: pytest.fail("work was done"))
    with pytest.raises(DyBitError, match=rf"layer {reason}, cannot be exported to ONNX"):
        export(model, tmp_path / "m.onnx", [torch.zeros(2, 8)])
