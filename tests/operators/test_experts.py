"""Rows times the matrices of their experts: against float64 and against the experts one by one, on every path."""

import copy
import gc

import pytest
import torch
from mixture import Mixture
from torch import nn

import dybit
from dybit.errors import DyBitError
from dybit.kernels.code_operators import fake_quantize_dynamic
from dybit.layers.kinds import is_experts, weight_names
from dybit.layers.quantized import quantized_layers
from dybit.operators import experts as module
from dybit.operators.experts import experts, matrices, multiply_by_torch
from dybit.operators.input_rounding import InputRounding, input_format
from dybit.operators.linear import linear
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

SHAPE = (5, 7, 48)  # 35 choices of some bits each do not begin on bytes
SPECS = {
    "channel": TensorSpec("dybit4spare", SHAPE, row_dims=2),
    "group": TensorSpec("dybit4", SHAPE, "group", 20, choice="group", row_dims=2),
    "group_of_channels": TensorSpec("dybit3", SHAPE, "group", 16, "pow2", row_dims=2),
    "e4m3": TensorSpec("dybit2", SHAPE, "group", 16, "e4m3", choice="tensor", row_dims=2),
    "tensor": TensorSpec("int8", SHAPE, "tensor", choice="tensor", row_dims=2),
    "nf4": TensorSpec("nf4", SHAPE, row_dims=2),  # which the kernels cannot hold
    "transposed": TensorSpec("dybit4", (5, 48, 7), "group", 20, choice="group", row_dims=2, transposed=1),
    "transposed_channel": TensorSpec("dybit3spare", (5, 48, 7), row_dims=2, transposed=1),
}


def made(name):
    torch.manual_seed(0)
    weight = torch.randn(SHAPE) * torch.rand(5, 7, 1)
    return quantize(weight.mT if SPECS[name].transposed else weight, SPECS[name])


def dequantized(weight, dtype=torch.float32):
    """The matrices: (experts, rows, columns)."""
    values = weight.dequantize(dtype)
    return values.mT if weight.spec.transposed else values


def rows(n=11):
    torch.manual_seed(1)
    return torch.randn(n, 48), torch.tensor([3, 0, 3, 4, 4, 4, 4, 4, 4, 0, 3] * n)[:n]


@pytest.mark.parametrize("name", SPECS)
def test_against_double_precision(name):
    weight, (x, expert) = made(name), rows()
    expected = torch.stack(
        [dequantized(weight, torch.float64)[e] @ row for e, row in zip(expert, x.double(), strict=True)]
    )
    y = experts(x, expert, weight)
    assert y.shape == (11, 7) and torch.allclose(y.double(), expected, atol=1e-5)
    assert torch.allclose(multiply_by_torch(x, expert, dequantized(weight)), y, atol=1e-5)
    operator = torch.ops.dybit.experts(
        x, expert, weight.packed, weight.scale, weight.choice, weight.tensor_scale, weight.spec.key, "", 1.0, 0
    )
    assert torch.equal(operator, y)


@pytest.mark.parametrize("name", SPECS)
def test_every_expert_is_a_weight_of_its_own(name):
    weight = made(name)
    for number, part in enumerate(matrices(weight)):
        assert part.spec.shape == weight.spec.shape[1:] and part.packed.shape == part.spec.packed_shape
        assert torch.equal(part.dequantize(), weight.dequantize()[number])
    assert matrices(weight)[0].packed.untyped_storage().data_ptr() == weight.packed.untyped_storage().data_ptr()


@pytest.mark.parametrize("group", [0, 16])
def test_rounded_inputs(group):
    weight, (x, expert) = made("group"), rows()
    assert input_format("s8r2") is not None
    rounding = InputRounding("s8r2", reach=0.5, group_size=group)
    y = experts(x, expert, weight, rounding)
    alone = [linear(x[i : i + 1], matrices(weight)[e], None, rounding)
             for i, e in enumerate(expert.tolist())]  # fmt: skip
    assert torch.equal(y, torch.cat(alone))
    rounded = fake_quantize_dynamic(x, "s8r2", 0.5, group)
    assert torch.allclose(y, experts(rounded, expert, weight), atol=1e-5)


def test_no_expert_and_no_row():
    weight, (x, expert) = made("group"), rows()
    y = experts(x, torch.where(expert == 4, 5, expert), weight)
    assert torch.equal(y, experts(x, expert, weight) * (expert != 4)[:, None])
    assert experts(x[:0], expert[:0], weight).shape == (0, 7)


def test_gradients():
    weight, (x, expert) = made("group"), rows()
    x.requires_grad_()
    experts(x, expert, weight).square().sum().backward()
    given = x.detach().clone().requires_grad_()
    multiply_by_torch(given, expert, weight.dequantize()).square().sum().backward()
    assert torch.allclose(x.grad, given.grad, atol=1e-4)


def test_the_operator():
    weight, (x, expert) = made("group"), rows()
    parts = (weight.packed, weight.scale, weight.choice, weight.tensor_scale, weight.spec.key)
    torch.library.opcheck(torch.ops.dybit.experts, (x.requires_grad_(), expert, *parts, "", 1.0, 0))


def test_what_is_kept_goes_with_the_weight():
    gc.collect()
    before = len(module._cache)
    weight, (x, expert) = made("group"), rows()
    first = experts(x, expert, weight)
    assert len(module._cache) == before + 1
    weight.scale.mul_(2)
    assert torch.equal(experts(x, expert, weight), 2 * first)
    del weight
    gc.collect()
    assert len(module._cache) == before


def test_bad_arguments():
    weight, (x, expert) = made("group"), rows()
    with pytest.raises(DyBitError, match=r"x must be floating point of shape \(n, 48\) and expert of shape \(n,\)"):
        experts(x[:, :3], expert, weight)
    with pytest.raises(DyBitError, match=r"must be the matrices of experts, not of shape \(7, 48\)"):
        experts(x, expert, matrices(weight)[0])


MARKS = {
    "plain": {},
    "no_gate": {"gate": False},
    "transposed": {"transposed": True},
    "bias": {"bias": True},
    "norm": {"norm": True},
    "all": {"transposed": True, "bias": True, "norm": True},
    "all_no_gate": {"gate": False, "transposed": True, "bias": True},
}


def calls(n=6):
    torch.manual_seed(2)
    return torch.randn(n, 16), torch.rand(n, 4).topk(2).indices, torch.rand(n, 2)


@pytest.mark.parametrize("marks", MARKS.values(), ids=MARKS)
def test_layers(marks, tmp_path):
    model = nn.Sequential(Mixture(**marks))
    assert is_experts(model[0]) and weight_names(model[0]) == (model[0].first, "down_proj")
    recipe = dybit.Recipe(weights=4, group_size=8)
    quantized = dybit.quantize_(copy.deepcopy(model), recipe)
    assert list(quantized_layers(quantized)) == ["0"]
    y = quantized[0](*calls())
    assert torch.allclose(dybit.dequantize_(copy.deepcopy(quantized))[0](*calls()), y, atol=1e-4)
    x, index, weights = calls()
    assert torch.equal(quantized[0](x, index, torch.zeros(6, 4).scatter(1, index, weights)), y)
    dybit.save(quantized, tmp_path / "out")
    assert torch.equal(dybit.load(tmp_path / "out", nn.Sequential(Mixture(**marks)))[0](*calls()), y)
    compiled = torch.compile(quantized[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 9):
        assert torch.allclose(compiled(*calls(n)), quantized[0](*calls(n)), atol=1e-6)


@pytest.mark.parametrize("marks", [{}, MARKS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("activations", [None, 8])
def test_training(activations, marks):
    model = nn.Sequential(Mixture(**marks), nn.Linear(16, 16))
    recipe = dybit.Recipe(weights=4, activations=activations, activation_mode="dynamic")
    dybit.prepare_qat_(model, recipe)
    y = model[0](*calls())
    y.square().sum().backward()
    hit = calls()[1].unique()
    assert model[0].down_proj_quantizer is not None and model[0]._parameters["down_proj"].grad[hit].abs().sum() > 0
    with torch.no_grad():
        y = model[0](*calls())
    dybit.convert_(model)
    assert torch.allclose(model[0](*calls()), y, atol=1e-4 * float(y.abs().max()))
