"""Tests of reading integer ONNX models: every layout, value for value, and hostile files."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import dybit
import onnx
from dybit.errors import CheckpointError, DyBitError
from dybit.formats import packing
from dybit.onnx import export, read
from onnx import TensorProto, helper

ROWS, COLUMNS = 6, 32
DTYPES = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4, "int2": ml_dtypes.int2, "int8": np.int8, "uint8": np.uint8}


def save(path, nodes, initializers, shape=(1, COLUMNS), opset=21):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [ir.to_proto(ir.tensor(array, name=name)) for name, array in initializers.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=13 if opset > 23 else 10), path)
    return path


def integers(kind, low, high, shape=(ROWS, COLUMNS)):
    return np.random.default_rng(0).integers(low, high + 1, shape).astype(DTYPES[kind])


def scales(*shape):
    return np.random.default_rng(1).uniform(0.5, 2, shape).astype(np.float32)


def dequantize(path, values, scale, zero=None, use="Gemm", **attributes):
    """A file with one DequantizeLinear before a product."""
    initializers = {"layer.weight_quantized": values, "s": scale} | ({} if zero is None else {"z": zero})
    node = helper.make_node("DequantizeLinear", list(initializers), ["w"], name="dq", **attributes)
    product = {"Gemm": {"transB": 1}, "MatMul": {}, "Conv": {}}[use]
    return save(path, [node, helper.make_node(use, ["x", "w"], ["y"], **product)], initializers)


@pytest.mark.parametrize(
    ("kind", "low", "high", "zero", "family"),
    [
        ("int8", -127, 127, None, "s8r1"),
        ("int8", -128, 127, None, "int8full"),
        ("int4", -7, 7, None, "s4r1"),
        ("int4", -8, 7, None, "int4full"),
        ("uint4", 0, 15, 8, "int4full"),
        ("uint4", 0, 15, 3, "int4asym"),
        ("uint8", 1, 255, 128, "s8r1"),
        ("uint8", 100, 227, 100, "s8r1"),
    ],
)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_integers_become_the_same_values(tmp_path, kind, low, high, zero, family, granularity):
    values, scale = integers(kind, low, high), scales(*(() if granularity == "tensor" else (ROWS,)))
    point = None if zero is None else np.full(scale.shape, zero, DTYPES[kind])
    found = read(dequantize(tmp_path / "m.onnx", values, scale, point, axis=0))
    weight = found.weights["layer.weight"]
    assert weight.spec.family == family and weight.spec.granularity == granularity
    expected = (values.astype(np.float32) - (zero or 0)) * np.broadcast_to(scale.reshape(-1, 1), values.shape)
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)


@pytest.mark.parametrize("use", ["Gemm", "MatMul"])
def test_blocks_and_their_zero_points(tmp_path, use):
    values, scale = integers("uint4", 0, 15), scales(ROWS, 4)
    zero = np.arange(ROWS * 4).reshape(ROWS, 4).astype(np.int64) % 16
    expected = (values.astype(np.int64) - zero.repeat(8, 1)).astype(np.float32) * scale.repeat(8, 1)
    stored = [values, scale, zero.astype(ml_dtypes.uint4)]
    if use == "MatMul":
        stored = [np.ascontiguousarray(array.T) for array in stored]
    path = dequantize(tmp_path / "m.onnx", *stored, use=use, axis=int(use == "Gemm"), block_size=8)
    weight = read(path).weights["layer.weight"]
    assert (weight.spec.family, weight.spec.group_size) == ("int4asym", 8)
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)


def test_convolution(tmp_path):
    values, scale = integers("int8", -127, 127, (4, 2, 3, 3)), scales(4)
    path = tmp_path / "m.onnx"
    nodes = [
        helper.make_node("DequantizeLinear", ["c.weight", "s"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    found = read(save(path, nodes, {"c.weight": values, "s": scale}, (1, 2, 5, 5)))
    expected = values * scale.reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(found.weights["c.weight"].dequantize().numpy(), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_products_of_onnx_runtime(tmp_path, bits, zeros):
    rng = np.random.default_rng(0)
    block, count = 16, 2
    codes = rng.integers(0, 1 << bits, (ROWS, COLUMNS))
    zero = rng.integers(0, 1 << bits, (ROWS, count)) if zeros and bits < 8 else np.full((ROWS, count), 1 << (bits - 1))
    scale = scales(ROWS, count)
    pack = lambda a: packing.pack(a.astype(np.uint8), bits)  # noqa: E731
    initializers = {"a.q_proj.MatMul.weight_Q4": pack(codes).reshape(ROWS, count, -1), "s": scale.reshape(-1)}
    if zeros:
        initializers["z"] = pack(zero).reshape(-1)
    node = helper.make_node("MatMulNBits", ["x", *initializers], ["y"], domain="com.microsoft",
                            K=COLUMNS, N=ROWS, bits=bits, block_size=block)  # fmt: skip
    weight = read(save(tmp_path / "m.onnx", [node], initializers)).weights["a.q_proj.weight"]
    expected = (codes - zero.repeat(block, 1)).astype(np.float32) * scale.repeat(block, 1)
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)


def test_there_and_back(tmp_path):
    model = nn.Sequential(nn.Linear(COLUMNS, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(3, COLUMNS)
    dybit.quantize_(model, dybit.Recipe(weights="s8r1"))
    export(model, tmp_path / "m.onnx", [x], preset="fast-cpu")
    found = read(tmp_path / "m.onnx")
    assert set(found.weights) == {"0.weight", "2.weight"} and {"0.bias", "2.bias"} <= set(found.tensors)
    for name, weight in found.weights.items():
        assert torch.equal(weight.dequantize(), model.get_submodule(name.removesuffix(".weight")).weight)
    fresh = nn.Sequential(nn.Linear(COLUMNS, 16), nn.ReLU(), nn.Linear(16, 4))
    assert found.recipe.layer("0").weights == "s8r1"
    dybit.quantize_(fresh, found.recipe)  # the recipe fits the model that it came from
    assert type(fresh[0]) is type(model[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: dequantize(p, integers("uint8", 0, 255), scales(), np.uint8(0)), "integers from 0 to 255"),
        (lambda p: dequantize(p, integers("int8", -5, 5), scales(COLUMNS), axis=1), "scales of shape"),
        (lambda p: dequantize(p, integers("int8", -5, 5), -scales(ROWS), axis=0), "negative or not finite"),
        (lambda p: dequantize(p, integers("int8", -5, 5), scales(ROWS) * np.nan, axis=0), "negative or not finite"),
        (
            lambda p: save(p, [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": scales(ROWS, COLUMNS)}),
            "no weight in DequantizeLinear or MatMulNBits",
        ),
    ],
    ids=["unsigned", "axis", "negative", "nan", "float"],
)
def test_what_is_not_exact_is_refused(tmp_path, make, message):
    with pytest.raises(DyBitError, match=message):
        read(make(tmp_path / "m.onnx"))


def test_hostile_files(tmp_path):
    path = dequantize(tmp_path / "m.onnx", integers("int8", -127, 127), scales(ROWS), axis=0)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    broken = [data[:size] for size in range(0, len(data), 37)]
    for _ in range(60):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            changed[place] ^= 1 << int(rng.integers(8))
        broken.append(bytes(changed))
    refused = 0
    for part in broken:
        path.write_bytes(part)
        try:
            found = read(path)  # a flipped bit of a weight or a scale makes another weight
            assert all(torch.isfinite(w.dequantize()).all() for w in found.weights.values())
        except DyBitError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > len(broken) / 2
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "missing.onnx")


def test_shapes_that_do_not_fit(tmp_path):
    initializers = {"a.weight": np.zeros((ROWS, 2, 7), np.uint8), "s": scales(ROWS * 2)}
    node = helper.make_node("MatMulNBits", ["x", *initializers], ["y"], domain="com.microsoft",
                            K=COLUMNS, N=ROWS, bits=4, block_size=16)  # fmt: skip
    with pytest.raises(DyBitError, match="do not fit its shape"):
        read(save(tmp_path / "m.onnx", [node], initializers))
