"""Functions of FP32 tensors as kernels: the numbers of torch in every layout, and what is left to torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import check
from torch import nn
from torch.nn import functional

from dybit.kernels import extension
from dybit.runtime.lower_tensors import clamp_limits, limits_of
from dybit.runtime.program import FusedProgram

pytestmark = pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels")


SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.5, -20.0, 88.0, -104.0, torch.inf, -torch.inf, torch.nan])
UNARIES = {
    "relu": torch.relu, "neg": torch.neg, "abs": torch.abs, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "exp": torch.exp,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": functional.silu, "gelu": functional.gelu,
    "hardsigmoid": functional.hardsigmoid, "hardswish": functional.hardswish, "relu6": functional.relu6,
    "hardtanh": lambda x: functional.hardtanh(x, -0.5, 2.0), "clamp": lambda x: x.clamp(-1, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", UNARIES)
def test_functions_of_one_tensor(name):
    function = UNARIES[name]
    x = torch.cat([SPECIAL, torch.linspace(-7, 7, 51)]).repeat(2).view(2, 64)
    if name == "gelu":
        x[x.isinf()] = 9.0  # torch: NaN
    check(function, x, steps=[name])
    images = torch.randn(2, 3, 5, 4)
    for given_images in (images, images.to(memory_format=torch.channels_last)):
        check(function, given_images, steps=[name])


def test_gelu_by_tanh():
    check(lambda x: functional.gelu(x, approximate="tanh"), torch.linspace(-9, 9, 101)[None], steps=["gelu"])


@settings(max_examples=12)
@given(st.data())
def test_functions_of_two_tensors_broadcast(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    operands = []
    for _ in range(2):
        own = [n if data.draw(st.booleans()) else 1 for n in shape][data.draw(st.integers(0, len(shape) - 1)) :]
        operands.append(torch.randn(own).abs() + 0.5)
    if operands[0].ndim > 1 and data.draw(st.booleans()):
        operands[0] = operands[0].transpose(0, 1).contiguous().transpose(0, 1)
    function = data.draw(st.sampled_from([torch.add, torch.sub, torch.mul, torch.div]))
    check(function, *operands)


def test_numbers_broadcast():
    x = torch.randn(3, 5)
    check(lambda x: (2.0 - x) * 3 / 7.0 + 1, x, steps=["rsub", "mul", "div", "add"])
    check(lambda x, y: torch.add(x, y, alpha=2.0), x, x, steps=["torch:aten.add.Tensor"])


def test_softmax_of_the_last_dimension():
    x = torch.randn(3, 4, 37) * 20
    x[0, 0, 3:] = -torch.inf
    check(lambda x: torch.softmax(x, -1), x, steps=["softmax"])
    check(lambda x: torch.softmax(x, 2), x, steps=["softmax"])
    check(lambda x: torch.softmax(x, 1), x, steps=["torch:aten.softmax.int"])


def test_other_types_are_left_to_torch():
    x = torch.arange(12).view(3, 4)
    check(lambda x: x * 2 + x, x, steps=["torch:aten.mul.Tensor", "torch:aten.add.Tensor"])
    check(lambda x: torch.relu(x), x.double(), steps=["torch:aten.relu.default"])
    check(lambda x: x + 1.0, torch.randn(4, 0), steps=["torch:aten.add.Tensor"])


def test_squares():
    check(lambda x: x**2, torch.randn(3, 5), steps=["pow"])
    check(lambda x: x**3, torch.randn(3, 5), steps=["torch:aten.pow.Tensor_Scalar"])


def normalized(features, affine, **options):
    norm = nn.BatchNorm2d(features, affine=affine, **options).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 2.0)
    if affine:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    return norm


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_takes_up_a_clamp(affine):
    norm, x = normalized(5, affine), torch.randn(2, 5, 4, 3)
    x[0, 1, 0, 0] = torch.nan
    check(norm, x, steps=["batch_norm"])
    check(lambda x: functional.relu6(norm(x)), x, steps=["batch_norm"])
    check(lambda x: torch.relu_(norm(x)), x.to(memory_format=torch.channels_last), steps=["batch_norm"])
    check(lambda x: ((y := norm(x)), torch.relu(y)), x, steps=["batch_norm", "relu"])
    rows = nn.BatchNorm1d(5, affine=affine).eval()
    check(lambda x: rows(x).relu(), torch.randn(7, 5), steps=["batch_norm"])
    check(rows, torch.randn(7, 5, 3), steps=["torch:aten.batch_norm.default"])


@pytest.mark.usefixtures("restore_isa")
def test_batch_norm_has_the_same_bits_on_all_sets():
    norm, x = normalized(37, True), torch.randn(2, 37, 4, 3)
    results = []
    for isa in extension.available():
        if isa != extension.FALLBACK:
            extension.use(isa)
            results.append(FusedProgram(norm, (x,), {})(x))
    assert all(torch.equal(y, results[0]) for y in results)


def test_limits_of_a_clamp():
    graph = torch.fx.Graph()
    x, aten = graph.placeholder("x"), torch.ops.aten
    cases = [
        (aten.relu6.default, (x,), (0.0, 6.0)),
        (aten.hardtanh.default, (x,), (-1.0, 1.0)),
        (aten.hardtanh.default, (x, -2), (-2.0, 1.0)),
        (aten.clamp.default, (x, None, 3.0), (-torch.inf, 3.0)),
        (aten.clamp.default, (x, 4.0, 3.0), None),
        (aten.clamp_min.default, (x, 3.0), (3.0, torch.inf)),
        (aten.clamp_max.default, (x, 3.0), (-torch.inf, 3.0)),
        (aten.clamp.Tensor, (x, x), None),
        (aten.relu.default, (x,), None),
    ]
    for target, args, expected in cases:
        node = graph.call_function(target, args)
        assert clamp_limits(node) == expected
        assert limits_of(node) == ((0.0, torch.inf) if target is aten.relu.default else expected)
