"""Tests that inputs rounded by ONNX nodes are those of torch, bit for bit, on every kind of tie and extreme."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from dybit.formats import catalogue
from dybit.layers.input_spec import InputSpec
from dybit.layers.swap import swap_
from dybit.onnx.graph import Builder
from dybit.onnx.rounding import integer_round, is_integer, table_round
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

COLUMNS = 12


def layer_with(spec, scale=0.3, offset=0.7):
    layer = nn.Linear(COLUMNS, 2)
    weight = quantize(layer.weight, TensorSpec("s4", (2, COLUMNS)))
    swap_(layer, {"weight": weight}, spec, torch.tensor([scale]), torch.tensor([offset]))
    return layer


def run(emit, x):
    value = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([value], [], nodes=[], name="g", opset_imports={"": 21})
    build = Builder(graph)
    y = emit(build, value)
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(x.shape)
    graph.extend(build.take())
    graph.outputs.append(y)
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]


def hard_inputs(format, scale, offset):
    """Values, midpoints and their neighbours, and what lies far away."""
    book = catalogue.family(format).books[0]
    points = np.concatenate([book.levels, book.midpoints])
    x = (points * scale + offset).astype(np.float32)
    extremes = np.array([0.0, -0.0, 1e-30, 1e30, -1e30, np.inf, -np.inf, np.nan], np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf)), extremes])
    x = np.concatenate([x, np.random.default_rng(0).normal(0, 3, 400).astype(np.float32)])
    return torch.from_numpy(np.resize(x, (-(-len(x) // COLUMNS), COLUMNS)))


@pytest.mark.parametrize("format", ["s4", "u4", "s2", "s8", "u8r3", "s8r1", "e2m1", "nf4", "s4r2spare", "s3mid"])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("scale", [0.25, 0.3])
def test_static(format, offset, scale):
    layer = layer_with(InputSpec(format, offset=offset), scale)
    x = hard_inputs(format, scale, 0.7 * offset)
    y = run(lambda build, value: table_round(build, value, layer, 2), x)
    np.testing.assert_array_equal(y, layer.round_input(x).numpy())


@pytest.mark.parametrize("format", ["s4", "s8", "nf4", "s8r1"])
@pytest.mark.parametrize("group", [None, 4, 5])
def test_dynamic(format, group):
    layer = layer_with(InputSpec(format, "dynamic", 1.5, group))
    x = hard_inputs(format, 1.0, 0.0)
    x = torch.cat([torch.nan_to_num(x, nan=0.0), torch.zeros(1, COLUMNS), torch.full((1, COLUMNS), 1e-42)])
    x = torch.cat([x, torch.linspace(-3.4e38, 3.4e38, COLUMNS)[None]])
    y = run(lambda build, value: table_round(build, value, layer, 2), x)
    np.testing.assert_array_equal(y, layer.round_input(x).numpy())


@pytest.mark.parametrize("format", ["s8r1", "u8r1", "int8", "int8full", "uint4", "s5r1"])
@pytest.mark.parametrize("offset", [False, True])
def test_integers(format, offset):
    layer = layer_with(InputSpec(format, offset=offset), 0.25)  # where quotients are exact, and so are ties
    x = hard_inputs(format, 0.25, 0.7 * offset)
    assert is_integer(layer)
    x = torch.nan_to_num(x, nan=0.0)  # QuantizeLinear does not say what becomes of NaN
    y = run(lambda build, value: integer_round(build, value, layer), x)
    np.testing.assert_array_equal(y, layer.round_input(x).numpy())


@pytest.mark.parametrize("format", ["s4", "nf4", "s4spare", "e2m1"])
def test_other_formats_are_no_integers(format):
    assert not is_integer(layer_with(InputSpec(format)))


def test_dynamic_inputs_are_no_integers():
    assert not is_integer(layer_with(InputSpec("s8r1", "dynamic", 1.0)))
