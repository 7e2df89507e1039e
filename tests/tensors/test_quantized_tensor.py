"""Packed weights against shapes by hand, an independent reshape, and the NumPy oracle."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import from_matrix, numpy_weight

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.format import variants
from dybit.formats.packing import packed_size
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

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


def test_matrices_of_experts():
    weight = torch.randn(3, 5, 16)
    spec = TensorSpec("dybit4spare", (3, 5, 16), "group", 8, row_dims=2)
    assert (spec.rows, spec.columns, spec.packed_shape) == (15, 16, (15, 2, 4, 1))
    assert TensorSpec.from_dict(spec.to_dict()) == spec and spec.to_dict()["row_dims"] == 2
    assert "row_dims" not in TensorSpec("dybit4", (3, 5, 16)).to_dict()
    flat = quantize(weight.view(15, 16), TensorSpec("dybit4spare", (15, 16), "group", 8))
    assert torch.equal(quantize(weight, spec).dequantize(), flat.dequantize().view(3, 5, 16))
    turned = TensorSpec("dybit4spare", (3, 16, 5), "group", 8, row_dims=2, transposed=1)
    assert (turned.rows, turned.columns) == (15, 16) and TensorSpec.from_dict(turned.to_dict()) == turned
    assert torch.equal(quantize(weight.mT, turned).dequantize().mT, flat.dequantize().view(3, 5, 16))
    assert torch.equal(quantize(weight.mT, turned).packed.flatten(), flat.packed.flatten())
    for fields in ({"row_dims": 2, "shape": (3, 5)}, {"row_dims": 3}, {"row_dims": 2, "transposed": 3}):
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
