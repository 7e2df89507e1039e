import pytest
from onnx_writer_cases import EXACT, exported

import onnx
from dybit.errors import DyBitError


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
