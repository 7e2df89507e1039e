"""Tests of constraints: what they accept."""

import math

import pytest

from dybit import DyBitError, MaxDrop, MaxError, MaxSize, Speedup
from dybit.mixed_precision.constraint import as_constraints


@pytest.mark.parametrize("kind", [Speedup, MaxError, MaxSize])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "4", None, True])
def test_numbers(kind, value):
    with pytest.raises(DyBitError, match=kind.__name__):
        kind(value)


def test_drops():
    assert MaxDrop(0).points == 0
    for bad in (-1, math.nan, "1"):
        with pytest.raises(DyBitError, match="points of MaxDrop"):
            MaxDrop(bad)
    with pytest.raises(DyBitError, match="evaluate"):
        MaxDrop(1.0, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one"),
        (4.0, "not 4.0"),
        ([Speedup(2), "x"], "'x'"),
        ([Speedup(2), Speedup(3)], "two of one kind"),
        ([MaxError(1), MaxDrop(1)], "one of them"),
    ],
)
def test_lists(given, message):
    with pytest.raises(DyBitError, match=message):
        as_constraints(given)


def test_one_or_several():
    assert as_constraints(Speedup(2)) == (Speedup(2),)
    assert as_constraints([Speedup(2), MaxSize(10)]) == (Speedup(2), MaxSize(10))
