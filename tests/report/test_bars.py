"""Tests of bars for quantized models side by side."""

import pytest

from dybit.errors import DyBitError
from dybit.report.bars import Measure, Network, bars
from dybit.report.histogram import save, to_svg


def network(title="Net", measures=2):
    values = ([4.0, 1.0], [None, 0.5])[:measures]
    words = (["4 MB", "1 MB"], ["", "50 %"])[:measures]
    panels = [Measure(f"measure {i}", *pair) for i, pair in enumerate(zip(values, words, strict=True))]
    return Network(title, ["FP32", "W4A8"], panels)


def test_bars_are_as_long_as_their_values():
    figure = bars([network(), network("Other")])
    panels = [axes for part in figure.subfigs for axes in part.axes]
    assert [[bar.get_width() for bar in axes.patches] for axes in panels] == [[4.0, 1.0], [0.0, 0.5]] * 2
    assert all(axes.get_xlim()[1] > max(bar.get_width() for bar in axes.patches) for axes in panels)


def test_names_titles_and_words_are_in_the_picture(tmp_path):
    figure = bars([network(), network("Other")])
    svg = to_svg(figure)
    for text in ("Net", "Other", "FP32", "W4A8", "measure 0", "measure 1", "4 MB", "50 %"):
        assert f">{text}<" in svg
    save(figure, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("networks", [[], [network(), network(measures=1)], [Network("Net", ["FP32"], [])]])
def test_unequal_networks_are_refused(networks):
    with pytest.raises(DyBitError, match="same number of measures"):
        bars(networks)
