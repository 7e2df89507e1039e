import pytest
import torch
from interchange_cases import weight

from dybit.interchange.blocks import Blocks, from_blocks, to_blocks


def test_nvfp4_with_a_power_of_two_is_exact():
    original = weight("nvfp4")
    power = torch.tensor([2.0**-5])
    original = type(original)(original.spec, original.packed, original.scale, None, power)
    blocks = to_blocks(original, "w")
    assert blocks.divisor == 64
    assert torch.equal(from_blocks(blocks, "w").dequantize(), original.dequantize())


@pytest.mark.parametrize("divisor", [1.0, 3.0, 1234.567, 1e-3])
def test_any_nvfp4_is_read_exactly(divisor):
    blocks = to_blocks(weight("nvfp4"), "w")
    blocks = Blocks(blocks.packed, blocks.scale, torch.tensor([divisor]))
    read = from_blocks(blocks, "w")
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([blocks.packed & 15, blocks.packed >> 4], dim=-1).flatten(1).long()
    values = torch.where(codes > 7, -1.0, 1.0) * e2m1[codes & 7]
    expected = values.view(5, -1, 16) * (blocks.scale.float() / divisor)[..., None]
    assert torch.equal(read.dequantize(), expected.flatten(1))


@pytest.mark.parametrize("exponent", [0, 1, 60, 127, 190, 254])
def test_every_exponent_of_mxfp4_is_read_exactly(exponent):
    packed = torch.arange(16, dtype=torch.uint8).view(1, 16) * 16 + 5
    read = from_blocks(Blocks(packed, torch.full((1, 1), exponent, dtype=torch.uint8)), "w")
    high = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    expected = torch.stack([torch.full((16,), 3.0, dtype=torch.float64), high], dim=1).flatten() * 2.0 ** (
        exponent - 127
    )
    assert torch.equal(read.dequantize().flatten(), expected.float())
