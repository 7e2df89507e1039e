"""Curves of error against bits."""

import pytest

from dybit.errors import DyBitError
from dybit.report import curves


def test_every_line_is_drawn_and_ours_stands_out():
    lines = {"int": [(4, 0.2, "a"), (3, 0.5, "b")], "dybit{}": [(3, 0.3, ""), (4, 0.1, "")]}
    (axes,) = curves(lines, "title", "bits", "error", logarithmic=True).axes
    drawn = {line.get_label(): line for line in axes.lines}
    assert set(drawn) == set(lines) and axes.get_yscale() == "log"
    assert drawn["int"].get_xdata().tolist() == [3, 4] and drawn["int"].get_ydata().tolist() == [0.5, 0.2]
    assert drawn["dybit{}"].get_linewidth() > drawn["int"].get_linewidth()
    assert axes.get_title(loc="left") == "title" and axes.get_xlabel() == "bits"


def test_zero_has_no_logarithm():
    (axes,) = curves({"a": [(1, 0.0, "")]}, "t", "x", "y", logarithmic=True).axes
    assert axes.get_yscale() == "linear"


def test_no_points():
    with pytest.raises(DyBitError, match="at least one point"):
        curves({"a": []}, "t", "x", "y")
