"""How inputs are rounded: the fields and what they refuse."""

import pytest

from dybit.errors import DyBitError
from dybit.layers.input_spec import InputSpec

GOOD = InputSpec("s8", "dynamic", 4.0, 32).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "dybit8"}, "format of an input must be a single one, not the family 'dybit8'"),
        ({"format": 8}, "must be a string, not 8"),
        ({"format": "s9"}, "bits"),
        ({"mode": "both"}, "mode must be static or dynamic"),
        ({"mode": None}, "mode must be static or dynamic"),
        ({"mode": "static"}, "reach must be a positive number for dynamic inputs only, not 4.0"),
        ({"reach": None}, "reach must be a positive number for dynamic inputs only, not None"),
        ({"reach": 0.0}, "not 0.0"),
        ({"reach": float("nan")}, "not nan"),
        ({"reach": float("inf")}, "not inf"),
        ({"reach": "4"}, "not '4'"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": "32"}, "group_size='32'"),
        ({"mode": "static", "reach": None}, "group_size=32 and offset=False do not fit mode='static'"),
        ({"offset": True}, "offset=True do not fit mode='dynamic'"),
        ({"offset": 1}, "offset a boolean"),
        ({"more": 1}, "a stored input must have the fields"),
    ],
)
def test_bad_inputs(change, message):
    assert InputSpec.from_dict(GOOD).to_dict() == GOOD
    with pytest.raises(DyBitError) as error:
        InputSpec.from_dict({**GOOD, **change})
    assert message in str(error.value)


def test_bad_input_fields():
    for data in (None, [], {"format": "s8"}):
        with pytest.raises(DyBitError, match="a stored input must have the fields"):
            InputSpec.from_dict(data)
