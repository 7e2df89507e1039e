"""The words for scales agree with each other and with the types that hold them."""

from dybit.formats.scaling import GRANULARITIES, METHODS, SCALE_BITS, SCALE_TYPES
from dybit.tensors.scale_types import SCALE_DTYPES


def test_every_type_has_a_width():
    assert set(SCALE_TYPES) == set(SCALE_BITS) == set(SCALE_DTYPES)
    assert {name: 8 * dtype.itemsize for name, dtype in SCALE_DTYPES.items()} == SCALE_BITS


def test_order():
    assert GRANULARITIES == ("tensor", "channel", "group")  # later ones are finer, which checks rely on
    assert METHODS[0] == "mse"  # the default
