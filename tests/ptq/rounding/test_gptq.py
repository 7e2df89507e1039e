"""GPTQ of one weight against the textbook's column loop, in NumPy and with an explicit inverse."""

import numpy as np
import pytest
import torch
from correlated_inputs import LAYOUTS, correlated, matrix
from helpers import numpy_codes, numpy_units

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.kernels.packed_codes import pack
from dybit.ptq.rounding.gptq import Settings, factorize, gptq
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

ONCE = Settings(passes=0)


def textbook(weight, hessian, order, quantized, damping):
    """Optimal brain quantization, column by column in a fixed order: the codes, given the scales and choices."""
    spec = quantized.spec
    books = catalogue.family(spec.family).books
    scale = numpy_units(quantized.scales().numpy(), spec).astype(np.float64)
    choices = quantized.choices()
    choice = numpy_units(np.zeros((1, 1), int) if choices is None else choices.numpy(), spec)
    codes = np.zeros(weight.shape, np.uint8)
    h = hessian.astype(np.float64) + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    w = weight.astype(np.float64)
    left = list(order)
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        j = left[0]
        for row in range(len(w)):
            book = books[choice[row, j]]
            codes[row, j] = book.encode(w[row, j] / scale[row, j])
            value = book.decode(codes[row, j]) * scale[row, j]
            w[row, left[1:]] -= (w[row, j] - value) / inverse[0, 0] * inverse[0, 1:]
        left = left[1:]
    return codes


def output_error(weight, quantized, hessian):
    """The squared error of the outputs: Σ (w - q) H (w - q)ᵀ."""
    error = (quantized.spec.to_matrix(weight) - quantized.spec.to_matrix(quantized.dequantize())).double()
    parts = error.unflatten(0, (len(hessian), -1))
    return float(torch.einsum("pri,pij,prj->", parts, hessian.double(), parts))


@pytest.mark.parametrize(
    ("family", "sort"), [("dybit4", True), ("dybit3spare", False), ("nf4", True), ("dybit2mid", False), ("ant4", True)]
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_codes_are_those_of_the_textbook(family, layout, sort):
    weight, hessian = matrix(6, 28), correlated(28)
    spec = TensorSpec(family, (6, 28), **layout)
    found = gptq(weight, spec, hessian, settings=Settings(damping=0.02, sort=sort, passes=0))
    diagonal = hessian[0].diagonal().numpy()
    order = np.argsort(-diagonal, kind="stable") if sort else range(28)
    expected = textbook(weight.numpy(), hessian[0].numpy(), order, found, 0.02)
    assert np.array_equal(numpy_codes(found), expected)


def test_a_matrix_wider_than_the_blocks_of_columns():
    weight, hessian = matrix(3, 150), correlated(150)
    found = gptq(weight, TensorSpec("dybit4", (3, 150)), hessian, settings=ONCE)
    order = np.argsort(-hessian[0].diagonal().numpy(), kind="stable")
    assert np.array_equal(numpy_codes(found), textbook(weight.numpy(), hessian[0].numpy(), order, found, 0.03))


def test_parts_have_hessians_of_their_own():
    weight, hessian = matrix(6, 12), correlated(12, parts=3)
    spec = TensorSpec("dybit4", (6, 12))
    found = gptq(weight, spec, hessian, settings=Settings(sort=False, passes=0))
    codes, choices = numpy_codes(found), found.choices().view(3, 1, 2).to(torch.uint8)
    choices = pack(choices.view(3, 2), 4).view(3, 1, -1)
    for part in range(3):
        rows = slice(2 * part, 2 * part + 2)
        alone = QuantizedTensor(TensorSpec("dybit4", (2, 12)), found.packed[rows], found.scale[rows], choices[part])
        assert np.array_equal(
            textbook(weight[rows].numpy(), hessian[part].numpy(), range(12), alone, 0.03), codes[rows]
        )


@pytest.mark.parametrize("scale", ["fp32", "bf16", "pow2", "e4m3"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("family", ["dybit4spare", "int4asym"])
def test_better_than_rounding_to_the_nearest(scale, family, layout):
    weight, hessian = matrix(16, 40), correlated(40)
    spec = TensorSpec(family, (16, 40), scale=scale, **layout)
    nearest = quantize(weight, spec, importance=hessian[0].diagonal())
    once, found = gptq(weight, spec, hessian, settings=ONCE), gptq(weight, spec, hessian)
    assert output_error(weight, found, hessian) < 0.8 * output_error(weight, nearest, hessian)
    assert output_error(weight, found, hessian) <= output_error(weight, once, hessian)
    assert found.scale.dtype == spec.scale_dtype and found.packed.shape == spec.packed_shape


@pytest.mark.parametrize("shape", [(12, 4, 3), (12, 4, 3, 3)])
@pytest.mark.parametrize("parts", [1, 3])
def test_convolutions(shape, parts):
    weight = matrix(12, int(np.prod(shape[1:]))).view(shape)
    hessian = correlated(int(np.prod(shape[1:])), parts)
    spec = TensorSpec("dybit3", shape)
    found = gptq(weight, spec, hessian)
    assert output_error(weight, found, hessian) < output_error(weight, quantize(weight, spec), hessian)


def test_transposed_weights():
    weight, hessian = matrix(8, 12).view(8, 6, 2), correlated(8, parts=2)
    spec = TensorSpec("dybit4", (8, 6, 2), transposed=2)  # 4 of 8 channels and 2 positions are multiplied by a row
    found = gptq(weight, spec, hessian)
    assert output_error(weight, found, hessian) < output_error(weight, quantize(weight, spec), hessian)


def test_dead_channels():
    weight, hessian = matrix(4, 10), correlated(10)
    hessian[:, 3], hessian[:, :, 3] = 0, 0
    spec = TensorSpec("dybit4", (4, 10), "group", 2, choice="group")
    found = gptq(weight, spec, hessian)
    assert torch.isfinite(found.dequantize()).all()
    assert float((found.dequantize() - weight)[:, 3].abs().max()) < 1.0  # still rounded to something near


def test_inputs_that_were_always_zero():
    weight = matrix(4, 10)
    found = gptq(weight, TensorSpec("nf4", (4, 10)), torch.zeros(10, 10))
    nearest = quantize(weight, TensorSpec("nf4", (4, 10)))
    errors = [float((x.dequantize() - weight).square().sum()) for x in (found, nearest)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("rank", [1, 5])
def test_singular_hessians(rank):
    weight, hessian = matrix(4, 30), correlated(30, rank=rank)
    spec = TensorSpec("dybit3", (4, 30))
    for damping in (0.0, 0.01):
        found = gptq(weight, spec, hessian, settings=Settings(damping=damping))
        assert output_error(weight, found, hessian) < output_error(weight, quantize(weight, spec), hessian)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_size_of_inputs_does_not_matter(factor):
    weight, hessian = matrix(4, 20), correlated(20)
    spec = TensorSpec("dybit4", (4, 20))
    assert torch.equal(gptq(weight, spec, hessian * factor).packed, gptq(weight, spec, hessian).packed)


def test_half_precision_and_one_column():
    weight = matrix(4, 1).bfloat16()
    found = gptq(weight, TensorSpec("dybit4", (4, 1)), torch.ones(1, 1))
    assert torch.allclose(found.dequantize(), weight.float(), rtol=1e-5)


def test_factors():
    hessian = correlated(12, parts=2)
    above, diagonal = factorize(hessian, 0.0)
    unit = above.double() + torch.eye(12).double()
    assert torch.allclose(unit @ torch.diag_embed(diagonal.double()) @ unit.mT, hessian.double(), rtol=1e-4, atol=1e-4)
    assert float(above.tril().abs().max()) == 0


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(5), r"hessian must have shape \(6, 6\) or \(parts, 6, 6\) with parts dividing 4 rows, not \(5, 5\)"),
        (torch.eye(6).expand(3, 6, 6), r"not \(3, 6, 6\)"),
        (torch.full((6, 6), torch.nan), "hessian holds NaN or infinity"),
        (-torch.eye(6), "negative second moment"),
        (torch.ones(6, 6) - 2 * torch.eye(6).roll(1, 0) * 500, "hessian is not positive semidefinite"),
    ],
)
def test_bad_hessians(hessian, message):
    with pytest.raises(DyBitError, match=message):
        gptq(matrix(4, 6), TensorSpec("dybit4", (4, 6)), hessian)


@pytest.mark.parametrize(
    ("field", "value"),
    [("damping", -1.0), ("damping", float("nan")), ("passes", -1), ("passes", 1.5), ("shrinkage", 1.1)],
)
def test_bad_settings(field, value):
    with pytest.raises(DyBitError, match=f"{field} must be"):
        Settings(**{field: value})


def test_weights_that_scales_cannot_hold_are_refused():
    weight = torch.randn(4, 4)
    weight[1, 1] = 1e30
    with pytest.raises(DyBitError, match=r"weight holds a magnitude of 1e\+30"):
        gptq(weight, TensorSpec("s4r2", (4, 4), scale="e4m3"), torch.eye(4))
