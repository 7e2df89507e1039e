"""Tests of the pictures and of the page."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from dybit.errors import DyBitError, MissingExtraError
from dybit.report import FormatRow, histogram, write_page
from dybit.report.histogram import check_path, save, to_svg

ROWS = [
    FormatRow("dybit4", np.linspace(-2, 2, 15), "20.1 dB", "s4r2", "dybit"),
    FormatRow("nf4", np.array([-9.0, -1, 0, 1]), "20.0 dB"),
    FormatRow("Lloyd-Max", np.linspace(-2, 2, 16), "21.0 dB", kind="bound"),
]


@pytest.fixture
def figure():
    return histogram(np.random.default_rng(0).normal(size=5000), ROWS, "A title", "and a line <below>")


def test_png_and_svg(figure, tmp_path):
    save(figure, tmp_path / "a.png")
    save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.svg").read_text()
    ElementTree.fromstring(text)
    assert "A title" in text and "20.1 dB" in text and "+1" in text  # one level of nf4 lies outside


def test_svg_is_deterministic(figure):
    assert to_svg(figure) == to_svg(figure)


def test_page_is_one_file_and_escapes(figure, tmp_path):
    path = tmp_path / "p.html"
    write_page(
        path, title="<b>", notes=["a & b"], svg=to_svg(figure), columns=["name", ">dB"], rows=[("", ["<i>", "1"])]
    )
    text = path.read_text()
    assert "&lt;b&gt;" in text and "&lt;i&gt;" in text and "a &amp; b" in text and "<svg" in text
    assert not re.search(r"(src|href)=\"(?!#)", re.sub(r"xlink:href=\"#[^\"]*\"", "", text))


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
