"""Which convolutions the kernels take, and what they refuse."""

import pytest
import torch

from dybit.errors import DyBitError
from dybit.kernels import extension
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.input_rounding import InputRounding
from dybit.operators.packed_conv import packed_conv_for
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec
from kernels import ISAS

pytestmark = pytest.mark.skipif(not ISAS, reason="no compiled kernels")
ONES, NONE, BORDER = (1, 1), (0,) * 4, (1,) * 4
STATIC, OFFSET = InputRounding("int8", torch.ones(1)), InputRounding("u8r1", torch.ones(1), torch.ones(1))


def weight_of(shape, family="dybit4"):
    return quantize(torch.randn(shape), TensorSpec(family, shape))


@pytest.mark.parametrize(
    ("shape", "family", "groups", "padding", "rounding", "taken"),
    [
        ((4, 6, 3, 3), "dybit4", 1, BORDER, STATIC, True),
        ((4, 6, 3, 3), "dybit4", 1, NONE, OFFSET, True),
        ((4, 6, 3, 3), "dybit4", 1, BORDER, OFFSET, False),  # zeros are no multiples of a step from the offset
        ((4, 6, 3, 3), "dybit4", 1, BORDER, InputRounding("uint8", torch.ones(1), -torch.ones(1)), True),
        ((4, 6, 3, 3), "nf4", 1, BORDER, STATIC, False),
        ((4, 6, 3, 3), "dybit4", 1, BORDER, InputRounding("nf4", torch.ones(1)), False),
        ((6, 1, 3, 3), "dybit4", 6, BORDER, STATIC, True),
        ((12, 1, 3, 3), "dybit4", 6, BORDER, STATIC, True),  # two results a channel
        ((4, 6, 3, 3), "dybit4", 2, BORDER, STATIC, True),
        ((4, 2, 1, 3), "dybit4plain", 2, BORDER, STATIC, True),
        ((4, 2, 1, 3), "s4r1mid", 2, BORDER, STATIC, False),  # groups of too few columns, without zeros to merge them
        ((34, 1, 1, 3), "dybit4", 2, BORDER, STATIC, False),  # many results of too few columns
    ],
)
def test_what_the_kernels_take(shape, family, groups, padding, rounding, taken):
    weight, geometry = weight_of(shape, family), ConvGeometry(ONES, padding, ONES, groups)
    packed = packed_conv_for(weight, geometry, rounding)
    assert (packed is not None) == taken and packed_conv_for(weight, geometry, rounding) is packed


@pytest.mark.parametrize("family", ["dybit4", "dybit8"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((40, 19, 3, 3), 1), ((24, 3, 3, 3), 1), ((6, 1, 1, 1), 1), ((70, 1, 3, 3), 70), ((8, 8, 1, 2), 2)],
)
@pytest.mark.usefixtures("restore_isa")
def test_planar_images_give_the_same_numbers(shape, groups, batch, family):
    torch.manual_seed(0)
    weight, bias = weight_of(shape, family), torch.randn(shape[0])
    for size in ((9, 23), (3, 3), (70, 65)):
        for isa in ISAS:
            extension.use(isa)
            packed = packed_conv_for(weight, ConvGeometry(ONES, BORDER, ONES, groups), STATIC)
            places = [n + 3 - k for n, k in zip(size, shape[2:], strict=True)]
            x = torch.randn(batch, shape[1] * groups, *size) * 30
            y, planar = torch.empty(batch, *places, shape[0]), torch.empty(batch, shape[0], *places)
            assert packed.run(x.permute(0, 2, 3, 1).contiguous(), y, places, bias, STATIC)
            assert packed.run(x, planar, places, bias, STATIC, planar=True)
            assert torch.equal(y.permute(0, 3, 1, 2), planar), isa


@pytest.mark.parametrize(("shape", "groups"), [((4, 6, 3, 3), 1), ((6, 1, 3, 3), 6)])
def test_foreign_tensors_never_reach_the_kernels(shape, groups):
    packed = packed_conv_for(weight_of(shape), ConvGeometry(ONES, NONE, ONES, groups), STATIC)
    x, y, bias = torch.randn(2, 7, 8, 6), torch.empty(2, 5, 6, shape[0]), torch.randn(shape[0])
    assert packed.run(x, y, (5, 6), bias, STATIC)
    half, wide = torch.bfloat16, torch.float64
    for given in (
        (x.to(half), y, (5, 6), bias, STATIC),
        (x.to(wide), y, (5, 6), bias, STATIC),
        (x.to("meta"), y, (5, 6), bias, STATIC),
        (x[..., :5].contiguous(), y, (5, 6), bias, STATIC),
        (x.permute(0, 1, 3, 2), y, (5, 6), bias, STATIC),
        (x, y.to(half), (5, 6), bias, STATIC),
        (x, y[:1], (5, 6), bias, STATIC),
        (x, y, (5, 6), bias.to(wide), STATIC),
        (x, y, (5, 6), bias[1:], STATIC),
        (x, y, (5, 6), bias, InputRounding("int8", torch.ones(1, dtype=half))),
        (x, y, (5, 6), bias, InputRounding("int8", torch.ones(1, 1))),
        (x, y, (5, 6), bias, InputRounding("int8", torch.ones(1), torch.zeros(1, dtype=wide))),
    ):
        with pytest.raises(DyBitError, match="must be a contiguous float32 tensor"):
            packed.run(*given)


@pytest.mark.parametrize("family", ["dybit2plain", "dybit4spare", "dybit8plain"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((128, 4, 3, 3), 32),
        ((12, 1, 3, 3), 6),
        ((4, 2, 1, 3), 2),
        ((15, 3, 1, 1), 5),
        ((40, 8, 3, 3), 4),
        ((7, 2, 3, 1), 7),
    ],
)
@pytest.mark.usefixtures("restore_isa")
def test_merged_groups_are_those_of_the_values(shape, groups, granularity, family):
    torch.manual_seed(0)
    weight = quantize(torch.randn(shape), TensorSpec(family, shape, granularity, None, "fp32", granularity))
    geometry = ConvGeometry(ONES, BORDER, ONES, groups)
    x, bias = torch.randint(-127, 128, (2, shape[1] * groups, 6, 7)).float(), torch.randn(shape[0])
    expected = geometry.convolve(x.double(), weight.dequantize(torch.float64), bias.double())
    for isa in ISAS:
        extension.use(isa)
        y = torch.empty(expected.shape)
        assert packed_conv_for(weight, geometry, STATIC).run(x, y, y.shape[2:], bias, STATIC, planar=True)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
