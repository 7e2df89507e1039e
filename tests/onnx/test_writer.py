"""Tests of the ONNX export: every kind of layer under every preset, checked by ONNX Runtime against the model."""

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import Tied, build, inputs, tokens
from torch import nn

import dybit
import onnx
from dybit import Recipe, quantize_
from dybit.errors import DyBitError
from dybit.onnx import export, writer

EXACT, ROUNDED = 2e-6, 2e-2


def run(path, **arrays):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: x.numpy() for name, x in arrays.items()})


def exported(tmp_path, name, preset="portable", **fields):
    model, x = build(name), inputs(name)
    quantize_(model, Recipe(**fields), calibration=[x])
    return export(model, tmp_path / "m.onnx", [x], preset=preset)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("linear", {"weights": 2, "group_size": 5}),
        ("linear_no_bias", {"weights": 3, "group_size": 4, "scale": "bf16"}),
        ("conv1d", {"weights": 5, "scale": "pow2"}),
        ("conv2d", {"weights": "mxfp4", "group_size": 32}),
        ("conv2d_depthwise", {"weights": 8, "granularity": "tensor"}),
        ("conv2d_reflect", {"weights": 6}),
        ("conv2d_subclass", {"weights": 4, "variants": "all"}),
        ("transposed2d", {"weights": 4, "group_size": 7, "variant_granularity": "tensor"}),
        ("embedding", {"embeddings": 3, "group_size": 4}),
        ("attention", {"weights": "nf4"}),
        ("attention_cross", {"weights": 7}),
        ("transformers_conv1d", {"weights": 4, "group_size": 4, "scale": "e4m3"}),
        ("tied", {"weights": 4, "embeddings": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_by_table_are_exact(tmp_path, name, fields):
    done = exported(tmp_path, name, **fields)
    assert done.check.difference < EXACT and done.check.runtime.startswith("ONNX Runtime")
    assert all("codes" in kind for kind in done.stored)


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
        ("linear", {"int8": 1}, {"weights": 5, "activations": "int8", "activation_offset": False}),
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


@pytest.mark.parametrize("fields", [{}, {"group_size": 5}, {"weights": "nvfp4", "group_size": 16}])
def test_fp4(tmp_path, fields):
    done = exported(tmp_path, "linear", preset="fp4", **{"weights": "s4r2", **fields})
    assert done.stored == {"FLOAT4E2M1": 1} and "reference" in done.check.runtime
    assert done.check.difference < EXACT
    types = {tensor.data_type for tensor in onnx.load(done.path).graph.initializer}
    assert onnx.TensorProto.FLOAT4E2M1 in types


def test_fp4_needs_a_weight_of_its_values(tmp_path):
    with pytest.raises(DyBitError, match="'fp4' needs a weight of E2M1 values"):
        exported(tmp_path, "linear", preset="fp4", weights="s4")


def test_batch_and_length_are_dynamic(tmp_path):
    model = quantize_(Tied().eval(), Recipe(weights=4))
    done = export(model, tmp_path / "m.onnx", [tokens()[:1]])  # one sample only
    assert done.inputs == ("tokens [batch, length]",)
    for shape in ((1, 1), (7, 2), (2, 9)):
        x = torch.randint(0, 11, shape)
        with torch.no_grad():
            np.testing.assert_allclose(run(done.path, tokens=x)[0], model(x).numpy(), atol=1e-5)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x, *, shift=None, factor=2.0):
        y = self.inner(x) * factor
        return {"y": y if shift is None else y + shift, "parts": (y, y.sum())}


def test_arguments_and_results_of_any_kind(tmp_path):
    model = quantize_(Named(), Recipe(weights=4))  # in training mode, and so it stays
    batch = {"x": torch.randn(3, 6), "shift": torch.randn(3, 3), "factor": 3.0}
    export(model, tmp_path / "m.onnx", [batch])
    assert model.training and type(model.inner).__name__ == "QuantizedLinear"
    names = [value.name for value in onnx.load(tmp_path / "m.onnx").graph.output]
    assert names == ["y", "parts_0", "parts_1"]
    results = run(tmp_path / "m.onnx", x=batch["x"], shift=batch["shift"])
    np.testing.assert_allclose(results[0], model(**batch)["y"].detach().numpy(), atol=1e-6)


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


def test_a_difference_over_the_bound_leaves_no_file(tmp_path):
    model, x = quantize_(build("linear"), Recipe(weights=4)), inputs("linear")
    with pytest.raises(DyBitError, match="over the bound of 1e-09 for preset 'fast-cpu'"):
        export(model, tmp_path / "m.onnx", [x], preset="fast-cpu", bound=1e-9)
    assert not list(tmp_path.iterdir())


def test_two_gigabytes_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_LIMIT", 10)
    with pytest.raises(DyBitError, match="ONNX holds 2 GB in one file"):
        export(quantize_(build("linear"), Recipe(weights=4)), tmp_path / "m.onnx", [inputs("linear")])


def test_a_model_that_torch_cannot_export(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x) if x.sum().item() > 0 else x

    with pytest.raises(DyBitError, match=r"Branch cannot be exported by torch\.onnx"):
        export(quantize_(Branch(), Recipe(weights=4)), tmp_path / "m.onnx", [torch.ones(2, 4)])


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
