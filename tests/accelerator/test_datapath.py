import pytest

from dybit.accelerator.datapath import largest_integer, mode
from dybit.errors import DyBitError


class TestDatapath:
    def test_containers_hold_twice_their_bits(self):
        for bits in (2, 4, 8):
            assert largest_integer(bits, False) == 4 ** (bits - 1)
            assert largest_integer(bits, True) < 1 << (2 * bits - 1)

    @pytest.mark.parametrize(
        ("bits", "expected"), [((2, 2), (2, 2)), ((3, 4), (4, 4)), ((8, 2), (8, 8)), ((2, 5), (2, 8)), ((4, 3), (4, 4))]
    )
    def test_containers(self, bits, expected):
        fused = mode(*bits)
        assert (fused.weight_bits, fused.activation_bits) == expected
        assert mode(2, 2, narrowest=4) == mode(4, 4)
        assert mode(2, 4, narrowest=8) == mode(8, 8)

    @pytest.mark.parametrize("bits", [(1, 8), (8, 9), (True, 8), (4.0, 8), ("4", 8)])
    def test_unsupported_pairs(self, bits):
        with pytest.raises(DyBitError, match=r"bits of the pair .* must be an integer from 2 to 8, not"):
            mode(*bits)
