"""Float8 tensors survive pickles and copies, and what is shared stays shared."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dybit import Recipe, quantize_
from dybit.tensors.encoding import quantize
from dybit.tensors.float8 import picklable, restored
from dybit.tensors.quantized_tensor import TensorSpec

WAYS = [lambda value: pickle.loads(pickle.dumps(value)), copy.copy, copy.deepcopy]
each_way = pytest.mark.parametrize("way", WAYS, ids=["pickle", "copy", "deepcopy"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.uint8])
@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]], ids=["pickle", "deepcopy"])
def test_values_and_sharing(way, dtype):
    tensor = torch.arange(6).to(dtype).view(2, 3)
    first, second = way([picklable(tensor), picklable(tensor)])
    assert first is second and first is not tensor and first.dtype == dtype
    assert torch.equal(first.float(), tensor.float())
    assert restored(picklable(tensor)) is tensor and picklable(None) is None


@each_way
def test_quantized_tensors(way):
    for scale in ("e4m3", "fp32"):
        weight = quantize(torch.randn(4, 32), TensorSpec("s4r2", (4, 32), "group", 16, scale))
        made = way(weight)
        assert made.scale.dtype == weight.scale.dtype and torch.equal(made.dequantize(), weight.dequantize())


@each_way
def test_layers_with_e4m3_scales_and_other_buffers(way):
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32))
    model[0].register_buffer("eighth", torch.ones(3).to(torch.float8_e5m2))
    model[0].register_buffer("complex", torch.ones(3, dtype=torch.complex64))
    model[0].register_buffer("sparse", torch.eye(3).to_sparse())
    quantize_(model, Recipe(weights="nvfp4", group_size=16), strict=False)
    x = torch.randn(3, 32)
    expected = model(x)
    made = way(model)
    assert torch.equal(made(x), expected)
    assert made[0].weight_scale.dtype == torch.float8_e4m3fn and made[0].eighth.dtype == torch.float8_e5m2
    assert torch.equal(made[0].complex, model[0].complex)
    assert torch.equal(made[0].sparse.to_dense(), torch.eye(3))
    del made[0].complex  # torch casts it to real numbers
    made.to(torch.float64)
    assert made[0].weight_scale.dtype == torch.float8_e4m3fn
