import pytest
from helpers import build, inputs

from dybit import Recipe, quantize_
from dybit.errors import DyBitError
from dybit.onnx import export


def test_a_difference_over_the_bound_leaves_no_file(tmp_path):
    model, x = quantize_(build("linear"), Recipe(weights=4)), inputs("linear")
    with pytest.raises(DyBitError, match="over the bound of 1e-09 for preset 'fast-cpu'"):
        export(model, tmp_path / "m.onnx", [x], preset="fast-cpu", bound=1e-9)
    assert not list(tmp_path.iterdir())
