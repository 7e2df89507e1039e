"""Packed weights against shapes by hand, an independent reshape, and the NumPy oracle."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import from_matrix, numpy_codes, numpy_units, numpy_weight

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.format import variants
from dybit.formats.packing import packed_size
from dybit.tensors.quantized_tensor import (
    QuantizedTensor,
    TensorSpec,
    check_weight,
    encode_matrix,
    quantize,
    quantize_judged,
)
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
SPECS = [
    TensorSpec("dybit4", (6, 10)),
    TensorSpec("dybit3", (6, 10), "group", 4, "bf16", "group"),
    TensorSpec("s4", (6, 10), "tensor", choice="tensor"),
    TensorSpec("s4", (6, 2, 3), "group", 6),
    TensorSpec("dybit5", (6, 2, 3, 3), scale="pow2"),
    TensorSpec("nvfp4", (4, 40), "group", 16, "e4m3", "group"),
    TensorSpec("dybit4", (6, 4, 3, 3), transposed=3),
    TensorSpec("dybit7", (10, 6), "group", 4, choice="tensor", transposed=1),
]
each_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.family}-{len(spec.shape)}d-{spec.granularity}"
)


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


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [None, 7, 32, 128])
def test_storage_is_what_the_widths_say(bits, size):
    rows, columns = 12, 300
    spec = TensorSpec(
        f"dybit{bits}", (rows, columns), "group" if size else "channel", size, "bf16", "group" if size else "channel"
    )
    length = size or columns
    groups = [min(length, columns - start) for start in range(0, columns, length)]
    row = sum(math.ceil(n * bits / 8) for n in groups)
    assert spec.row_bytes == row == packed_size(columns, bits, size)
    choice_bits = math.ceil(math.log2(len(variants(bits))))
    choices = rows * math.ceil(len(groups) * choice_bits / 8) if len(groups) > 1 else math.ceil(rows * choice_bits / 8)
    assert spec.choice_bits == choice_bits
    assert spec.nbytes == rows * row + 2 * rows * len(groups) + choices
    made = quantize(torch.randn(rows, columns), spec)
    assert sum(buffer.nbytes for buffer in made.buffers().values()) == spec.nbytes


@each_spec
def test_spec_round_trips(spec):
    data = json.loads(json.dumps(spec.to_dict()))
    assert TensorSpec.from_dict(data) == spec
    assert spec.nbytes == sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.buffers().values())


@each_spec
def test_packed_codes_never_have_the_rank_of_the_weight(spec):
    assert len(spec.packed_shape) != len(spec.shape)
    assert spec.packed_shape[0] == spec.rows


@each_spec
def test_matrix_round_trips(spec):
    weight = torch.randn(spec.shape)
    matrix = spec.to_matrix(weight)
    assert matrix.shape == (spec.rows, spec.columns)
    assert torch.equal(spec.from_matrix(matrix), weight)
    assert np.array_equal(from_matrix(matrix.numpy(), spec), weight.numpy())
    made = quantize(weight, spec)
    assert np.array_equal(made.dequantize().numpy(), numpy_weight(made))


def test_transposed_rows_are_output_channels():
    # The row of an output channel of a transposed convolution holds what that channel is computed from.
    layer = torch.nn.ConvTranspose2d(6, 6, 2, groups=3, bias=False)
    spec = TensorSpec("s8", tuple(layer.weight.shape), transposed=3)
    matrix = spec.to_matrix(layer.weight.detach())
    assert spec.rows == 6
    for channel in range(6):
        mask = torch.zeros_like(matrix)
        mask[channel] = matrix[channel]
        with torch.no_grad():
            layer.weight.copy_(spec.from_matrix(mask))
            out = layer(torch.randn(1, 6, 3, 3)).abs().sum((0, 2, 3))
        assert (out > 0).nonzero().flatten().tolist() == [channel]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_types(dtype):
    weight = torch.randn(6, 10).to(dtype)
    spec = SPECS[1]
    made, same = quantize(weight, spec), quantize(weight.float(), spec)
    assert torch.equal(made.packed, same.packed) and torch.equal(made.scale, same.scale)
    assert made.dequantize(dtype).dtype == dtype


def test_layout_of_the_weight_does_not_matter():
    weight = torch.randn(6, 2, 3, 3)
    made = quantize(weight.to(memory_format=torch.channels_last), SPECS[4])
    assert torch.equal(made.packed, quantize(weight, SPECS[4]).packed)
    flipped = torch.randn(10, 6).t()
    assert torch.equal(quantize(flipped, SPECS[0]).packed, quantize(flipped.contiguous(), SPECS[0]).packed)


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
        (torch.zeros(0, 2), "weight must not be empty, but has shape (0, 2)"),
        (torch.zeros(2, 3), "weight must have shape (2, 2), not (2, 3)"),
        (torch.zeros(2, 2, device="meta"), "weight is on the meta device and has no values"),
    ],
)
def test_bad_weights(weight, message):
    with pytest.raises(DyBitError) as error:
        quantize(weight, TensorSpec("s4", (2, 2)))
    assert message in str(error.value)


GOOD = TensorSpec("dybit4", (6, 8), "group", 4, "bf16", "channel").to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "nonsense"}, "there is no format 'nonsense'"),
        ({"family": 4}, "must be a string, not 4"),
        ({"family": ["s4"]}, "must be a string"),
        ({"shape": []}, "shape must be 2 to 5 positive integers, not ()"),
        ({"shape": [4]}, "not (4,)"),
        ({"shape": [2, 0]}, "not (2, 0)"),
        ({"shape": [2, -1]}, "not (2, -1)"),
        ({"shape": [2, 2.0]}, "not (2, 2.0)"),
        ({"shape": [2, "2"]}, "not (2, '2')"),
        ({"shape": [2, [2]]}, "not (2, [2])"),
        ({"shape": [1, 1, 1, 1, 1, 1]}, "not (1, 1, 1, 1, 1, 1)"),
        ({"shape": [1 << 30, 1 << 30]}, "has more than"),
        ({"shape": "68"}, "a stored weight must have the fields"),
        ({"scale": "fp64"}, "scale must be one of fp32, bf16, pow2, e4m3, not 'fp64'"),
        ({"scale": None}, "not None"),
        ({"scale": ["fp32"]}, "not ['fp32']"),
        ({"granularity": "row"}, "granularity and choice must be one of tensor, channel, group, not 'row'"),
        ({"choice": {}}, "and {}"),
        ({"group_size": None}, "group_size=None does not fit granularity='group'"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": "4"}, "group_size='4'"),
        ({"granularity": "channel"}, "group_size=4 does not fit granularity='channel'"),
        ({"transposed": -1}, "transposed must be an integer of at least 0, not -1"),
        ({"transposed": "1"}, "not '1'"),
        ({"transposed": 4}, "transposed=4 does not divide the first dimension of shape (6, 8)"),
        ({"more": 1}, "a stored weight must have the fields"),
    ],
)
def test_bad_specs(change, message):
    with pytest.raises(DyBitError) as error:
        TensorSpec.from_dict({**GOOD, **change})
    assert message in str(error.value)


def test_missing_fields():
    for name in GOOD:
        with pytest.raises(DyBitError, match="a stored weight must have the fields"):
            TensorSpec.from_dict({key: value for key, value in GOOD.items() if key != name})
    for data in (None, [], "x", 3):
        with pytest.raises(DyBitError, match="a stored weight must have the fields"):
            TensorSpec.from_dict(data)


def test_every_power_of_two_survives_storage():
    exponents = torch.arange(-64, 64)
    for sign in (1.0, -1.0):
        scale = (sign * torch.pow(2.0, exponents.double())).float()[:, None]
        spec = TensorSpec("s4r2spare", (128, 1), scale="pow2")
        made = encode_matrix(torch.zeros(128, 1), spec, Scales(scale, None, 1.0, 0.0))
        assert torch.equal(made.scales(), scale)


def test_choices_of_a_single_row_and_of_many():
    for rows, columns, size in ((1, 6, None), (9, 6, None), (9, 6, 2), (1, 6, 2), (3, 6, 6)):
        spec = TensorSpec(
            "dybit4", (rows, columns), "group" if size else "channel", size, choice="group" if size else "channel"
        )
        made = quantize(torch.randn(rows, columns), spec)
        assert made.choices().shape == (rows, -(-columns // (size or columns)))
        assert np.array_equal(made.dequantize().numpy(), numpy_weight(made))


@pytest.mark.parametrize("granularity", ["channel", "group"])
@pytest.mark.parametrize("choice", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_a_choice_may_be_shared_more_widely_than_a_scale(granularity, choice, bits):
    if choice == "group" and granularity == "channel":
        return
    size = 5 if granularity == "group" else None
    spec = TensorSpec(f"dybit{bits}", (13, 18), granularity, size, choice=choice)
    weight = torch.randn(13, 18)
    made = quantize(weight, spec)
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in made.buffers().items()} == spec.buffers()
    assert made.choices().shape == spec.unit_shape(choice)
    assert np.array_equal(made.dequantize().numpy(), numpy_weight(made))
    assert (made.dequantize() - weight).square().mean() < (0.3 if bits == 2 else 0.05)


def test_family_of_one_stores_no_choice():
    made = quantize(torch.randn(4, 6), TensorSpec("s4", (4, 6)))
    assert made.choice is None and made.choices() is None
    assert isinstance(made, QuantizedTensor) and set(made.buffers()) == {"", "_scale"}
    assert catalogue.family("s4").choice_bits == 0


def test_peak_memory_is_under_twice_the_tensor():
    # The largest tensor of SmolLM2 has 28 M elements; 4 M here.
    script = """
import resource, threading, torch
from dybit.tensors.quantized_tensor import TensorSpec, quantize
torch.set_num_threads(1)
weight = torch.randn(4096, 1024)
quantize(weight[:64], TensorSpec("dybit4spare", (64, 1024), "group", 64, "bf16", "group"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize(weight, TensorSpec("dybit4spare", (4096, 1024), "group", 64, "bf16", "group"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / weight.nbytes)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 2


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("choice", ["tensor", "channel", "group"])
def test_scales_and_choices_of_some_rows(granularity, choice, scale):
    if ["tensor", "channel", "group"].index(choice) > ["tensor", "channel", "group"].index(granularity):
        pytest.skip("a choice finer than the scales")
    spec = TensorSpec("dybit4", (37, 24), granularity, 8 if granularity == "group" else None, scale, choice)
    weight = quantize(torch.randn(37, 24) * torch.rand(37, 1).exp(), spec)
    index = torch.tensor([36, 0, 5, 5, 21])
    for some, every in ((weight.scales(index), weight.scales()), (weight.choices(index), weight.choices())):
        assert torch.equal(some, every if every.shape[0] == 1 else every[index])


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


def test_matrices_of_experts():
    weight = torch.randn(3, 5, 16)
    spec = TensorSpec("dybit4spare", (3, 5, 16), "group", 8, row_dims=2)
    assert (spec.rows, spec.columns, spec.packed_shape) == (15, 16, (15, 2, 4, 1))
    assert TensorSpec.from_dict(spec.to_dict()) == spec and spec.to_dict()["row_dims"] == 2
    assert "row_dims" not in TensorSpec("dybit4", (3, 5, 16)).to_dict()
    flat = quantize(weight.view(15, 16), TensorSpec("dybit4spare", (15, 16), "group", 8))
    assert torch.equal(quantize(weight, spec).dequantize(), flat.dequantize().view(3, 5, 16))
    for fields in ({"row_dims": 2, "shape": (3, 5)}, {"row_dims": 3}, {"row_dims": 2, "transposed": 1}):
        with pytest.raises(DyBitError, match="row_dims must be 1, or 2 for a weight of three dimensions"):
            TensorSpec(**{"family": "dybit4", "shape": (3, 5, 16), **fields})


def test_members_of_a_family_that_has_grown():
    """``dybit2`` had two members, so that a weight which says nothing has; a larger number is a field of its own."""
    now = TensorSpec("dybit2", (12, 6))
    old = TensorSpec("dybit2", (12, 6), members=2)
    assert now == TensorSpec("dybit2", (12, 6), members=3) != old
    assert now.to_dict()["members"] == 3 and "members" not in old.to_dict()
    assert (now.choice_bits, now.choice_shape) == (2, (1, 3)) and (old.choice_bits, old.choice_shape) == (1, (1, 2))
    assert [book.name for book in old.formats.books] == ["s2", "s2mid"]
    for spec in (now, old, TensorSpec("dybit4", (12, 6), members=3), TensorSpec("dybit4", (12, 6))):
        assert TensorSpec.from_dict(spec.to_dict()) == spec
    assert "members" not in TensorSpec("dybit4", (12, 6)).to_dict()
    with pytest.raises(DyBitError, match="members must be 0 to the 3 codebooks of dybit2, not 4"):
        TensorSpec("dybit2", (12, 6), members=4)
    weight = torch.tensor([0.0, 1, 2, -1]).repeat(12, 3)  # for which the third member was made
    assert torch.equal(quantize(weight, TensorSpec("dybit2", (12, 12))).dequantize(), weight)
    stored = quantize(weight, TensorSpec("dybit2", (12, 12), members=2))
    assert stored.choices().max() <= 1 and not torch.equal(stored.dequantize(), weight)
