"""Gradients of rounding against formulas that autograd derives, and values against the NumPy oracle."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dybit.formats import catalogue
from dybit.qat.gradients import Layout, learning_factor, round_input, round_weight
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

pytestmark = pytest.mark.usefixtures("plain_torch")

FORMATS = ["int4", "int4full", "s3", "s4r2mid", "s3r1spare", "nf4", "u4", "pot4", "s2mid", "s8"]


def round_units(x, log_scale, scale, chosen, choice, family):
    """Rounds the rows of a matrix."""
    return round_weight(x, log_scale, scale, chosen, choice, Layout(TensorSpec(family, tuple(x.shape))))


def reference(x, scale, offset, book):
    """s · l((x - o) / s) + o, straight-through inside the range, for autograd to differentiate."""
    ratio = (x - offset) / scale
    clamped = ratio.clamp(book.levels[0], book.levels[-1])
    nearest = torch.from_numpy(book.decode(book.encode(ratio.detach().numpy()))).to(x.dtype)
    return scale * (clamped + (nearest - clamped).detach()) + offset


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_of_weights(name):
    book = catalogue.family(name).books[0]
    x = torch.randn(5, 7, dtype=torch.float64) * float(book.levels[-1])
    scale = torch.tensor([0.5, 0.3, 1.1, 2.0, -0.7 if book.levels[0] < 0 else 0.7], dtype=torch.float64)[:, None]
    mine, log_scale, upstream = x.float().requires_grad_(), torch.zeros(5, 1, requires_grad=True), torch.randn(5, 7)
    rounded = round_units(mine, log_scale, scale.float(), scale.float() * 1.25, None, name)
    rounded.backward(upstream)
    x, scale = x.float().double().requires_grad_(), scale.float().double().requires_grad_()
    expected = reference(x, scale, 0.0, book)
    expected.backward(upstream.double())
    torch.testing.assert_close(rounded.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), x.grad)
    wanted = scale.grad * scale / (1.25 * scale) ** 2 * learning_factor(book) / math.sqrt(7)
    torch.testing.assert_close(log_scale.grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("offset", [None, -0.6])
def test_gradients_of_inputs(name, offset):
    book = catalogue.family(name).books[0]
    x, upstream = torch.randn(6, 5) * float(book.levels[-1]), torch.randn(6, 5)
    mine, log_scale, shift = x.clone().requires_grad_(), torch.zeros(1, requires_grad=True), torch.zeros(1)
    shift.requires_grad_()
    given = None if offset is None else torch.tensor([offset])
    rounded = round_input(mine, log_scale, shift, torch.tensor([0.7]), torch.tensor([0.8]), given, name)
    rounded.backward(upstream)
    x, scale = x.double().requires_grad_(), torch.tensor([0.7]).double().requires_grad_()
    moved = torch.tensor([offset or 0.0]).double().requires_grad_()
    expected = reference(x, scale, moved, book)
    expected.backward(upstream.double())
    torch.testing.assert_close(rounded.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad.double(), x.grad)
    factor = learning_factor(book) / math.sqrt(5)
    torch.testing.assert_close(log_scale.grad.double(), scale.grad * scale / 0.8**2 * factor, rtol=1e-4, atol=1e-4)
    step = (book.levels[-1] - book.levels[0]) / (len(book.levels) - 1)
    wanted = 0 * moved.grad if offset is None else moved.grad / 0.8 * step * factor
    torch.testing.assert_close(shift.grad.double(), wanted.double(), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_an_integer_scale_is_that_of_lsq():
    x, upstream, scale = torch.randn(3, 9), torch.randn(3, 9), 0.3
    log_scale = torch.zeros(3, 1, requires_grad=True)
    round_units(x, log_scale, torch.full((3, 1), scale), torch.full((3, 1), scale), None, "int3").backward(upstream)
    ratio = x / scale
    by_element = torch.where(ratio.abs() <= 3, ratio.round() - ratio, ratio.clamp(-3, 3))
    lsq = (upstream * by_element).sum(1, keepdim=True) / math.sqrt(9 * 3)  # of the step size: LSQ, equations 3 and 5
    torch.testing.assert_close(log_scale.grad, lsq / scale)


def test_saturated_elements_have_no_gradient():
    x = torch.tensor([[-4.0, -1.6, -1.5, 0.0, 0.2, 1.5, 1.6, 100.0]], requires_grad=True)
    round_units(x, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), None, "s2mid").sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    x = torch.tensor([-1.0, 0.0, 0.3, 8.0, 8.1], requires_grad=True)
    round_input(x, torch.zeros(1), None, torch.ones(1), torch.ones(1), None, "u4").sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("name", ["dybit4", "dybit3", "ant4", "int4asym", "adaptivfloat8", "dybit8plain"])
def test_units_with_different_codebooks(name):
    family = catalogue.family(name)
    choice = torch.arange(len(family.books), dtype=torch.uint8)[:, None]
    x = torch.randn(len(family.books), 200, requires_grad=True)
    log_scale = torch.zeros(len(family.books), 1, requires_grad=True)
    scale = torch.rand(len(family.books), 1) + 0.2
    rounded = round_units(x, log_scale, scale, scale, choice, name)
    rounded.backward(torch.ones_like(x))
    for i, book in enumerate(family.books):
        alone, one = x.detach()[i : i + 1].clone().requires_grad_(), torch.zeros(1, 1, requires_grad=True)
        expected = round_units(alone, one, scale[i : i + 1], scale[i : i + 1], None, book.name)
        expected.backward(torch.ones_like(alone))
        assert torch.equal(rounded[i : i + 1], expected) and torch.equal(x.grad[i : i + 1], alone.grad)
        torch.testing.assert_close(log_scale.grad[i : i + 1], one.grad)
        oracle = book.decode(book.encode(alone.detach().numpy() / scale[i].numpy())).astype(np.float32)
        assert np.array_equal(expected.detach().numpy(), oracle * scale[i].numpy())


def test_nan_stays_nan():
    x = torch.tensor([[math.nan, 1.0]])
    for family, choice in (("int4", None), ("dybit4", torch.zeros(1, 1, dtype=torch.uint8))):
        rounded = round_units(x, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), choice, family)
        assert rounded.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("name", ["dybit4", "dybit3mid", "ant4", "nf4"])
@pytest.mark.parametrize("columns", [16, 700])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_compiled_kernels_round_to_the_same_bits(name, columns, mixed, monkeypatch):
    count, rows = len(catalogue.family(name).books), 40
    choice = (torch.arange(rows) % count if mixed else torch.full((rows,), count - 1)).to(torch.uint8)[:, None]
    x, scale = torch.randn(rows, columns) * 3, torch.rand(rows, 1) + 0.2
    x[0, 0], x[1, 1], scale[2] = math.nan, math.inf, -0.5
    arguments = (x, torch.zeros(rows, 1), scale, scale, None if count == 1 else choice, name)
    step, first = torch.tensor([0.3]), catalogue.family(name).books[0].name
    inputs = (x, torch.zeros(1), None, step, step, None, first)
    plain = round_units(*arguments), round_input(*inputs)
    monkeypatch.undo()
    for expected, found in zip(plain, (round_units(*arguments), round_input(*inputs)), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_tensors_without_memory(monkeypatch):
    monkeypatch.undo()
    with FakeTensorMode():
        x = torch.empty(4, 16)
        assert round_input(x, torch.zeros(1), None, torch.ones(1), torch.ones(1), None, "s4").shape == x.shape
        assert round_units(x, torch.zeros(4, 1), torch.ones(4, 1), torch.ones(4, 1), None, "s4").shape == x.shape


@pytest.mark.parametrize("name", [*FORMATS, "dybit2mid", "int4z0", "int4z15", "posit8es2"])
@pytest.mark.parametrize("size", [1.0, 1e-10, 1e-20, 1e-30, 1e-41, 0.0])
def test_gradients_of_units_next_to_zero_are_finite(name, size):
    """The scale of a zero unit in a codebook without zero is 2^-126, whose square is zero."""
    for sizes in ([size], [1.0, size], [size, 0.0, 1e-25]):
        units = torch.randn(len(sizes), 9) * torch.tensor(sizes)[:, None]
        weight = quantize(units, TensorSpec(name, tuple(units.shape)))
        scale, x = weight.scales(), units.clone().requires_grad_()
        log_scale = torch.zeros_like(scale, requires_grad=True)
        round_units(x, log_scale, scale, scale, None, name).backward(torch.randn_like(x))
        assert torch.isfinite(x.grad).all() and torch.isfinite(log_scale.grad).all()
    x, log_scale = (torch.randn(4, 9) * size).requires_grad_(), torch.zeros(1, requires_grad=True)
    scale, shift = torch.tensor([max(size, 2.0**-126)]), torch.zeros(1, requires_grad=True)
    for offset in (None, torch.zeros(1)):
        round_input(x, log_scale, shift, scale, scale, offset, name).backward(torch.randn_like(x))
    assert all(torch.isfinite(tensor.grad).all() for tensor in (x, log_scale, shift))


def test_empty_inputs():
    x, log_scale = torch.randn(0, 9, requires_grad=True), torch.zeros(1, requires_grad=True)
    for offset in (None, torch.zeros(1)):
        rounded = round_input(x, log_scale, None, torch.ones(1), torch.ones(1), offset, "s4")
        rounded.sum().backward()
        assert rounded.shape == x.grad.shape == (0, 9) and log_scale.grad.item() == 0
