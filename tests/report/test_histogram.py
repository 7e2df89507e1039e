"""Tests of the pictures and of the page."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from report_cases import ROWS, picture

from dybit.errors import DyBitError, MissingExtraError
from dybit.report import histogram
from dybit.report.histogram import check_path, save, to_svg


def test_png_and_svg(tmp_path):
    figure = picture()
    save(figure, tmp_path / "a.png")
    save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.svg").read_text()
    ElementTree.fromstring(text)
    assert "A title" in text and "20.1 dB" in text and "+1" in text  # one level of nf4 lies outside


def test_svg_is_deterministic():
    figure = picture()
    assert to_svg(figure) == to_svg(figure)


def test_nothing_to_draw():
    with pytest.raises(DyBitError, match="not 0 and 3"):
        histogram(np.zeros(0), ROWS, "t")


def test_constant_weights_can_be_drawn(tmp_path):
    save(histogram(np.zeros(10), ROWS, "t"), tmp_path / "z.png")


def test_paths_are_checked_first(tmp_path, monkeypatch):
    with pytest.raises(DyBitError, match=r"\.png or \.svg.*'a\.pdf'"):
        check_path(Path("a.pdf"))
    with pytest.raises(DyBitError, match="does not exist"):
        check_path(tmp_path / "no" / "a.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"dybit\[plot\]"):
        check_path(tmp_path / "a.png")
