"""Rounding of weights to packed codes against the NumPy oracle."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import numpy_codes, numpy_units, numpy_weight

from dybit.errors import DyBitError
from dybit.tensors.encoding import check_weight, encode_matrix, quantize, quantize_judged, requantize
from dybit.tensors.quantized_tensor import TensorSpec
from dybit.tensors.scale_search import Scales

FAMILIES = [f"dybit{bits}" for bits in range(2, 9)] + [
    "s3",
    "u4",
    "s4r2spare",
    "s2mid",
    "nf4",
    "int5asym",
    "int8",
    "ant6",
]


GRANULARITIES = [("tensor", None), ("channel", None), ("group", 5), ("group", 8), ("group", 100)]
GROUPED = TensorSpec("dybit3", (6, 10), "group", 4, "bf16", "group")
CONVOLUTION = TensorSpec("dybit5", (6, 2, 3, 3), scale="pow2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("granularity", "size"), GRANULARITIES, ids=str)
@pytest.mark.parametrize("scale", ["fp32", "bf16", "pow2", "e4m3"])
def test_equals_the_oracle(family, granularity, size, scale):
    weight = torch.randn(5, 21)
    spec = TensorSpec(family, (5, 21), granularity, size, scale, granularity)
    made = quantize(weight, spec)
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in made.buffers().items()} == spec.buffers()
    # The codes are those of the nearest values, by the exact encoder.
    books = spec.formats.books
    scales = numpy_units(made.scales().numpy(), spec)
    choice = numpy_units(np.zeros((1, 1), int) if made.choice is None else made.choices().numpy(), spec)
    ratio = weight.numpy() / scales
    expected = np.stack([book.encode(ratio) for book in books])
    codes = np.take_along_axis(expected, choice[None], 0)[0]
    assert np.array_equal(numpy_codes(made), codes)
    assert np.array_equal(made.codes().numpy(), codes)
    assert np.array_equal(made.dequantize().numpy(), numpy_weight(made))
    assert made.dequantize(torch.bfloat16).dtype == torch.bfloat16
    # Quantizing is a projection: what is there already stays.
    again = encode_matrix(
        spec.to_matrix(made.dequantize()),
        spec,
        Scales(made.scales(), made.choices(), 1.0 if made.tensor_scale is None else made.tensor_scale.item(), 0.0),
    )
    assert torch.equal(again.dequantize(), made.dequantize())
    for name, buffer in again.buffers().items():
        if name:
            assert torch.equal(buffer.float(), made.buffers()[name].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_types(dtype):
    weight = torch.randn(6, 10).to(dtype)
    made, same = quantize(weight, GROUPED), quantize(weight.float(), GROUPED)
    assert torch.equal(made.packed, same.packed) and torch.equal(made.scale, same.scale)
    assert made.dequantize(dtype).dtype == dtype


def test_layout_of_the_weight_does_not_matter():
    weight = torch.randn(6, 2, 3, 3)
    made = quantize(weight.to(memory_format=torch.channels_last), CONVOLUTION)
    assert torch.equal(made.packed, quantize(weight, CONVOLUTION).packed)
    flipped, spec = torch.randn(10, 6).t(), TensorSpec("dybit4", (6, 10))
    assert torch.equal(quantize(flipped, spec).packed, quantize(flipped.contiguous(), spec).packed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(value):
    weight = torch.zeros(4, 3, 2)
    weight[2, 1, 0] = value
    weight[3, 0, 0] = math.nan
    with pytest.raises(DyBitError, match=rf"weight holds {value} at position \(2, 1, 0\)"):
        quantize(weight, TensorSpec("s4", (4, 3, 2)))
    large = torch.zeros(3, 1 << 20)
    large[2, 12345] = value
    with pytest.raises(DyBitError, match=rf"weight holds {value} at position \(2, 12345\)"):
        check_weight(large)
    rows = torch.zeros(1 << 21, 1)
    rows[(1 << 21) - 1] = value
    with pytest.raises(DyBitError, match=r"at position \(2097151, 0\)"):
        check_weight(rows)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int8), "weight must be floating point, not torch.int8"),
        (torch.zeros(2, 2, dtype=torch.complex64), "weight must be floating point, not torch.complex64"),
        (
            torch.zeros(2, 2).to(torch.float8_e4m3fn),
            "weight must not be torch.float8_e4m3fn: multiply it by",
        ),
        (torch.zeros(0, 2), "weight must not be empty, but has shape (0, 2)"),
        (torch.zeros(2, 3), "weight must have shape (2, 2), not (2, 3)"),
        (torch.zeros(2, 2, device="meta"), "weight is on the meta device and has no values"),
    ],
)
def test_bad_weights(weight, message):
    with pytest.raises(DyBitError) as error:
        quantize(weight, TensorSpec("s4", (2, 2)))
    assert message in str(error.value)


def test_peak_memory_is_under_twice_the_tensor():
    # The largest tensor of SmolLM2 has 28 M elements; 4 M here.
    script = """
import resource, threading, torch
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec
torch.set_num_threads(1)
weight = torch.randn(4096, 1024)
quantize(weight[:64], TensorSpec("dybit4spare", (64, 1024), "group", 64, "bf16", "group"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize(weight, TensorSpec("dybit4spare", (4096, 1024), "group", 64, "bf16", "group"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / weight.nbytes)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_value_that_is_not_finite_is_found(dtype, value):
    for place in ((0, 0), (3, 6), (6, 10)):
        weight = torch.randn(7, 11).to(dtype)
        check_weight(weight)
        weight[place] = value
        with pytest.raises(DyBitError, match=rf"weight holds {value} at position \({place[0]}, {place[1]}\)"):
            check_weight(weight)


def test_the_error_comes_with_the_codes():
    weight = torch.randn(13, 40)
    for spec in (
        TensorSpec("dybit4", (13, 40), "group", 16, choice="group"),
        TensorSpec("dybit3spare", (13, 40), scale="pow2", choice="tensor"),
        TensorSpec("nvfp4", (13, 40), "group", 16, "e4m3"),
    ):
        found, error = quantize_judged(weight, spec)
        assert torch.equal(found.packed, quantize(weight, spec).packed)
        assert error == pytest.approx((found.dequantize() - weight).square().sum().item(), rel=1e-4)


def test_float64_values_beyond_float32_are_named():
    weight = torch.ones(3, 4, dtype=torch.float64)
    weight[1, 2] = -1e300
    with pytest.raises(DyBitError, match=r"weight holds -1e\+300, beyond float32, at position \(1, 2\)"):
        quantize(weight, TensorSpec("s4", (3, 4)))


@pytest.mark.parametrize(("family", "reach"), [("mxfp4", 6), ("int4", 7), ("dybit4", 6)])
def test_weights_beyond_powers_of_two_are_refused(family, reach):
    size = 32 if family == "mxfp4" else None
    spec = TensorSpec(family, (3, 32), "group" if size else "channel", size, "pow2")
    weight = torch.randn(3, 32).clamp(-1, 1)
    weight[1, 5] = 2.0**63 * reach
    made = quantize(weight, spec)
    assert made.dequantize()[1, 5] == weight[1, 5]
    weight[1, 5] *= 1.01
    with pytest.raises(DyBitError, match=r"a magnitude of .*, above .*, to which scale='pow2' reaches in"):
        quantize(weight, spec)
    quantize(weight, replace(spec, family="s4", scale="bf16"))


@pytest.mark.parametrize("size", [None, 16, 24])
def test_a_weight_that_e4m3_scales_would_lose_is_refused(size):
    spec = TensorSpec("s4r2", (4, 40), "group" if size else "channel", size, "e4m3")
    weight = torch.randn(4, 40)
    weight[2, 3] = 3e4
    with torch.no_grad():
        made = quantize(weight, spec).dequantize()
    rows = [0, 1, 3]  # an outlier that is not too large leaves the others as they are
    assert (made[rows] - weight[rows]).square().sum() < 0.03 * weight[rows].square().sum()
    weight[2, 3] = 1e30
    with pytest.raises(DyBitError, match=r"a magnitude of 1e\+30, but most of its (channel|group)s hold at most"):
        quantize(weight, spec)
    assert torch.isfinite(quantize(weight, replace(spec, scale="fp32")).dequantize()).all()
    few = torch.randn(4, 40)
    few[2] *= 1e-30  # next to nothing: it may become zero
    assert (quantize(few, spec).dequantize()[2].abs() < 1e-3).all()
    zeros = torch.zeros(4, 40)
    zeros[1, 1] = 1e30
    assert quantize(zeros, spec).dequantize()[1, 1] == pytest.approx(1e30, rel=1e-3)


@pytest.mark.parametrize("family", ["dybit4", "int4asym", "nf4", "dybit8plain"])
@pytest.mark.parametrize(("granularity", "size"), [("tensor", None), ("channel", None), ("group", 5)])
@pytest.mark.parametrize("scale", ["fp32", "bf16", "pow2", "e4m3"])
def test_new_values_of_a_quantized_weight(family, granularity, size, scale):
    spec = TensorSpec(family, (6, 13), granularity, size, scale, "tensor" if granularity == "tensor" else "channel")
    old = quantize(torch.randn(6, 13), spec)
    values = old.dequantize()
    again = requantize(old, values)
    assert torch.equal(again.dequantize(), values)
    some = values.clone()
    some[2] *= 1.5
    for new in (some, torch.randn(6, 13), torch.zeros(6, 13)):
        found, fresh = requantize(old, new), quantize(new, spec)
        error, fresh_error = (float((trial.dequantize() - new).square().sum()) for trial in (found, fresh))
        assert found.spec == spec and error <= fresh_error * (1 + 1e-6)
        assert [part.shape for part in found.buffers().values()] == [part.shape for part in old.buffers().values()]
