"""How inputs are rounded, against the NumPy oracle; formats as the kernels know them."""

import numpy as np
import pytest
import torch
from helpers import numpy_round, numpy_round_dynamic

from dybit.formats import catalogue
from dybit.formats.format import Format
from dybit.operators.input_rounding import KEPT, InputRounding, input_format, max_significand


@pytest.mark.parametrize("name", ["s8r2", "u8r1", "int8", "nf4"])
def test_rounding_is_the_oracle(name):
    book = catalogue.family(name).books[0]
    x = torch.randn(3, 5, 24) * 2
    scale, offset = torch.tensor([0.03]), torch.tensor([-0.4])
    found = InputRounding(name, scale).round(x)
    np.testing.assert_array_equal(found.numpy(), numpy_round(x.numpy(), book, scale.item()))
    found = InputRounding(name, scale, offset).round(x)
    np.testing.assert_array_equal(found.numpy(), numpy_round(x.numpy(), book, scale.item(), offset.item()))
    for size in (0, 8):
        found = InputRounding(name, reach=1.7, group_size=size).round(x)
        np.testing.assert_array_equal(found.numpy(), numpy_round_dynamic(x.numpy(), book, 1.7, size or None))


def test_inputs_that_are_kept():
    x = torch.randn(3)
    assert KEPT.round(x) is x


@pytest.mark.parametrize("name", ["s8r2", "u4r1", "s5"])
def test_the_largest_significand(name):
    assert max_significand(input_format(name)) == Format.parse(name).max_significand


@pytest.mark.parametrize("name", ["u8r1", "uint8", "u8r3", "nf4"])
def test_whether_zero_has_a_code(name):
    levels, scale = torch.tensor(catalogue.family(name).books[0].levels, dtype=torch.float32), torch.tensor([0.037])
    assert InputRounding(name, scale).keeps_zero() and KEPT.keeps_zero()
    for level in levels[: len(levels) // 2]:
        assert InputRounding(name, scale, -level * scale).keeps_zero()
    between = (levels[1:] + levels[:-1]) / 2
    for offset in (-between[1] * scale, (1 - levels[0]) * scale, torch.empty(1, device="meta")):
        assert not InputRounding(name, scale, offset).keeps_zero()
