"""Shared by the tests of several modules."""

import numpy as np

from dybit.report import FormatRow, histogram

ROWS = [
    FormatRow("dybit4", np.linspace(-2, 2, 15), "20.1 dB", "s4r2", "dybit"),
    FormatRow("nf4", np.array([-9.0, -1, 0, 1]), "20.0 dB"),
    FormatRow("Lloyd-Max", np.linspace(-2, 2, 16), "21.0 dB", kind="bound"),
]


def picture():
    return histogram(np.random.default_rng(0).normal(size=5000), ROWS, "A title", "and a line <below>")
