"""Packing in torch against the portable packing."""

import numpy as np
import pytest
import torch

from dybit.formats import packing
from dybit.kernels import packed_codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [None, 1, 3, 8, 32, 100])
def test_packing_equals_the_portable_one(bits, group_size):
    for count in (1, 7, 8, 9, 33, 64, 100):
        codes = np.random.default_rng(count).integers(0, 1 << bits, (3, count)).astype(np.uint8)
        packed = packed_codes.pack(torch.from_numpy(codes), bits, group_size)
        assert np.array_equal(packed.numpy(), packing.pack(codes, bits, group_size))
        assert np.array_equal(packed_codes.unpack(packed, count, bits, group_size).numpy(), codes)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_packing_nothing(shape):
    packed = packed_codes.pack(torch.zeros(shape, dtype=torch.uint8), 3, 2)
    assert packed.shape == (shape[0], packing.packed_size(shape[1], 3, 2))
    assert packed_codes.unpack(packed, shape[1], 3, 2).shape == shape
