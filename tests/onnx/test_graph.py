"""The builder of graphs: equal constants once, types and shapes as ONNX has them."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from dybit.errors import DyBitError
from dybit.onnx.graph import Builder, data_type, unsigned


def builder():
    return Builder(ir.Graph([], [], nodes=[], opset_imports={"": 21}))


def test_equal_constants_are_one_initializer():
    build = builder()
    first, same, other = build.constant([1, 2]), build.constant([1, 2]), build.constant([1, 2], np.int64)
    assert first is same and first is not other
    assert len(build.graph.initializers) == 2
    assert other.const_value.numpy().dtype == np.int64


def test_nodes_come_in_order_and_are_taken_once():
    build = builder()
    x = ir.Value(name="x")
    y = build.slice(build.reshape(build.cast(x, ir.DataType.FLOAT16), [0, -1]), 1, 3)
    kinds = [node.op_type for node in build.take()]
    assert kinds == ["Cast", "Reshape", "Slice"] and y.producer().op_type == "Slice"
    assert build.take() == []


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(1, ml_dtypes.uint2), (2, ml_dtypes.uint2), (3, ml_dtypes.uint4), (4, ml_dtypes.uint4), (5, np.uint8)],
)
def test_codes_take_the_smallest_type(bits, dtype):
    codes = np.arange(1 << bits, dtype=np.uint8)
    found = unsigned(codes, bits)
    assert found.dtype == dtype and np.array_equal(found.astype(np.uint8), codes)


def test_types_by_name():
    assert data_type("bfloat16") == ir.DataType.BFLOAT16
    with pytest.raises(DyBitError, match="'int8' cannot be exported"):
        data_type("int8")
