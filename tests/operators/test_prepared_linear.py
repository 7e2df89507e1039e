"""What a linear layer keeps between its calls: the same bits as the operator, and never those of another weight."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dybit
from dybit.kernels import extension
from dybit.operators import packed_weight
from dybit.operators.input_rounding import InputFormat, input_format
from dybit.operators.linear import linear
from dybit.operators.prepared_linear import PreparedLinear
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

FIELDS = {
    "weights": {},
    "int8": {"activations": "int8", "activation_mode": "dynamic"},
    "groups": {"activations": 8, "activation_mode": "dynamic", "activation_group_size": 16},
    "static": {"activations": 8},
    "offset": {"activations": "uint8"},
}


def layer(fields=FIELDS["weights"], bias=True, weights=4):
    torch.manual_seed(0)
    recipe = dybit.Recipe(weights=weights, group_size=32, **fields)
    return dybit.quantize_(nn.Sequential(nn.Linear(64, 24, bias=bias)), recipe, [torch.randn(32, 64)])[0]


def slow(module, x):
    """The layer without what it keeps."""
    return linear(x, module.quantized_tensor(), module._parameters.get("bias"), module.input_rounding())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FIELDS)
@torch.no_grad()
def test_the_same_bits(name, bias):
    module = layer(FIELDS[name], bias)
    for shape in ((64,), (1, 64), (1, 1, 64), (2, 2, 64), (5, 64), (0, 64)):
        x = torch.randn(shape)
        for _ in range(2):
            assert torch.equal(module(x), slow(module, x)) and module(x).shape == (*shape[:-1], 24)
    strided = torch.randn(3, 128)[:, ::2]
    assert torch.equal(module(strided), slow(module, strided))
    half = torch.randn(2, 64).bfloat16()
    assert torch.equal(module(half), slow(module, half)) and module(half).dtype == torch.bfloat16


@torch.no_grad()
def test_weights_that_change():
    module, other, x = layer(), layer(weights=3), torch.randn(1, 64)
    y = module(x)
    module.weight_scale.mul_(2)
    assert torch.allclose(module(x) - module.bias, 2 * (y - module.bias))
    module._buffers["weight_scale"] = module.weight_scale / 2
    assert torch.equal(module(x), y)
    module.__dict__.update({key: other.__dict__[key] for key in ("_buffers", "weight_specs")})
    assert torch.equal(module(x), slow(other, x) - other.bias + module.bias) or torch.allclose(module(x), other(x))
    names, before = extension.available()[1:], extension.isa()
    try:
        for name in names:
            extension.use(name)
            assert torch.equal(module(x), slow(module, x))
    finally:
        if names:
            extension.use(before)


@torch.no_grad()
def test_copies_keep_nothing():
    module, x = layer(), torch.randn(1, 64)
    y = module(x)
    assert "_prepared" in module.__dict__
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert "_prepared" not in copied.__dict__ and torch.equal(copied(x), y)
    module.double()
    assert "_prepared" not in module.__dict__ and torch.allclose(module(x.double()).float(), y, atol=1e-5)
    model = nn.Sequential(layer())
    model(x)
    assert "_prepared" not in dybit.dequantize_(model)[0].__dict__


def test_gradients_and_wrong_shapes():
    module, x = layer(), torch.randn(1, 64, requires_grad=True)
    with torch.no_grad():
        module(x)
    module(x).sum().backward()
    assert torch.allclose(x.grad, module.weight.sum(0)[None], atol=1e-5)
    with torch.no_grad(), pytest.raises(dybit.DyBitError, match="x must have 64 columns"):
        module(torch.randn(1, 128))
    with torch.no_grad(), pytest.raises(dybit.DyBitError, match="x must be floating point"):
        module(torch.zeros(1, 64, dtype=torch.int64))


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        module, x = layer(), torch.randn(1, 64)
        assert torch.equal(module(x), slow(module, x)) and torch.equal(module(x), module(x))


@torch.no_grad()
def test_what_has_to_be_asked_for():
    weight = quantize(torch.randn(24, 64), TensorSpec("nf4", (24, 64)))  # the kernels cannot hold it
    x = torch.randn(3, 64)
    found = PreparedLinear(weight).multiply(x, "relu")
    assert torch.equal(found, torch.relu(x @ weight.dequantize().T))


@torch.no_grad()
def test_the_scalar_kernels_leave_several_unrounded_rows_to_torch():
    if "scalar" not in extension.available():
        pytest.skip("no compiled kernels")
    module, x, before = layer(), torch.randn(8, 64), extension.isa()
    weight = module.quantized_tensor()
    try:
        extension.use("scalar")
        assert packed_weight.PackedWeight(weight, InputFormat()).most_rows == 1
        assert packed_weight.PackedWeight(weight, input_format("s8")).most_rows > 1000
        assert torch.equal(module(x), nn.functional.linear(x, weight.dequantize(), module.bias))
    finally:
        extension.use(before)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace_method. is deprecated")
def test_torch_jit_traces_it(fields):
    module, x = layer(fields), torch.randn(3, 64)
    expected = module(x)
    traced = torch.jit.trace(nn.Sequential(module), x)
    assert torch.allclose(traced(x), expected, atol=1e-5)
    assert torch.allclose(traced(x[:2]), expected[:2], atol=1e-5)
