"""Shared by the tests of several modules."""

from helpers import build, inputs

from dybit import Recipe, quantize_
from dybit.onnx import export

EXACT, ROUNDED = 2e-6, 2e-2


def exported(tmp_path, name, preset="portable", **fields):
    model, x = build(name), inputs(name)
    quantize_(model, Recipe(**fields), calibration=[x])
    return export(model, tmp_path / "m.onnx", [x], preset=preset)
