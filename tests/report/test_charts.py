"""Tests of the charts as data, which plotly.js draws."""

import pytest

from dybit.report import charts
from dybit.report.charts import Point, Row


def test_points_can_be_told_apart_by_their_index():
    front = [Point("a", 1.0, 0.1), Point("b", 2.0, 0.2)]
    chart = charts.pareto(front, [Point("8/8", 1.0, 0.3)], front[1], "speedup", "error")
    assert [trace["customdata"] for trace in chart["data"]] == [[0, 1], [2], [3]]
    assert chart["layout"]["yaxis"]["rangemode"] == "tozero"


@pytest.mark.parametrize(("errors", "logarithmic"), [((1e-3, 1.0), True), ((0.5, 1.0), False), ((0.0, 1.0), False)])
def test_errors_of_several_decades_are_drawn_by_their_logarithm(errors, logarithmic):
    chart = charts.pareto([Point(str(e), 1.0, e) for e in errors], [], None, "speedup", "error")
    assert (chart["layout"]["yaxis"].get("type") == "log") is logarithmic and len(chart["data"]) == 1


def test_the_strip_leaves_floating_point_blank():
    chart = charts.strip([Row("a", weights=4, activations=0), Row("b", weights=0, activations=8)])
    trace = chart["data"][0]
    assert trace["z"] == [[None, 8], [4, None]] and trace["text"] == [["FP", "8"], ["4", "FP"]]


def test_the_colours_of_the_strip_are_those_of_the_bits():
    trace = charts.strip([Row("a", weights=4)])["data"][0]
    low, high = trace["zmin"], trace["zmax"]
    for bits, colour in charts._COLOURS.items():
        share = (bits - low) / (high - low)
        first = max(stop for stop, _ in trace["colorscale"] if stop < share)
        assert [c for stop, c in trace["colorscale"] if stop == first][-1] == colour


def test_missing_errors_stay_missing_and_choices_are_marked():
    rows = [Row("a", errors=(0.1, None)), Row("b", errors=(0.0, 1.0))]
    heat, marks = charts.sensitivity(rows, ["8/8", "4/4"], [1, None])["data"]
    assert heat["z"] == [[-1.0, None], [-12.0, 0.0]]
    assert (marks["x"], marks["y"]) == (["4/4"], ["a"])


def test_a_histogram_is_a_density_and_levels_outside_are_left_out():
    row = Row("a", edges=(0.0, 1.0, 3.0), counts=(1, 1), levels=(-1.0, 0.5, 2.0), format="s4r2")
    bars, lines = charts.histogram(row)["data"]
    assert sum(y * width for y, width in zip(bars["y"], bars["width"], strict=True)) == pytest.approx(1)
    assert [x for x in lines["x"] if x is not None] == [0.5, 0.5, 2.0, 2.0] and lines["name"] == "levels of s4r2"


def test_costs_keep_the_order_of_the_layers():
    rows = [Row("a", cost=1, bound="memory"), Row("b", cost=2, bound="compute"), Row("c", cost=3, bound="memory")]
    chart = charts.costs(rows, "cycles")
    assert [trace["name"] for trace in chart["data"]] == ["compute-bound", "memory-bound"]
    assert chart["layout"]["yaxis"]["categoryarray"] == ["a", "b", "c"]


def test_rivals_are_ranked():
    bars = charts.rivals(["int4", "dybit4"], [18.0, 20.0], [False, True])["data"][0]
    assert bars["y"] == ["dybit4", "int4"] and bars["marker"]["color"][0] == charts.OURS
