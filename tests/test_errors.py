"""The hierarchy of errors: what callers may catch."""

import pytest

from dybit.errors import CheckpointError, DyBitError, MissingExtraError


def test_bad_input_is_a_value_error():
    assert issubclass(DyBitError, ValueError)
    assert issubclass(CheckpointError, DyBitError)


def test_a_missing_extra_is_an_import_error_too():
    assert issubclass(MissingExtraError, DyBitError) and issubclass(MissingExtraError, ImportError)
    with pytest.raises(ImportError, match=r"pip install dybit\[demo\]"):
        raise MissingExtraError("install the demo: pip install dybit[demo]")


@pytest.mark.parametrize("kind", [DyBitError, CheckpointError, MissingExtraError])
def test_the_message_is_the_text(kind):
    assert str(kind("one sentence")) == "one sentence"
