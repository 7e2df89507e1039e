"""The charts of a search's report, as the JSON that plotly.js draws.

Colours of text, grid and background are the page's, which has a light and a dark theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log10
from typing import Any

Chart = dict[str, Any]

OURS, OTHERS, GREY = "#d9622b", "#5b8db8", "#8a96a3"
# From few bits (warm) to many (cold); floating point is grey.
_COLOURS = {2: "#b5361c", 3: "#dc6b2f", 4: "#f0a63c", 5: "#d8c458", 6: "#8fbf7f", 7: "#5aa7a0", 8: "#4a7fb0"}
_LEAST_ROW, _ROW = 280, 17  # pixels of a chart with a row for every layer


@dataclass(frozen=True)
class Point:
    """A recipe in the plane of speed and error.

    Attributes:
        name: What it is called.
        gain: How much better its cost is than the baseline's, such as a speedup of 2.5.
        error: Its error.
        recipe: Its recipe as JSON text, or empty.
        weights: Bits of every layer's weights, 0 for floating point; empty if not known.
        activations: Bits of every layer's activations, 0 for floating point.
    """

    name: str
    gain: float
    error: float
    recipe: str = ""
    weights: Sequence[int] = ()
    activations: Sequence[int] = ()


@dataclass(frozen=True)
class Row:
    """A layer.

    Attributes:
        name: Its qualified name.
        kind: Its shape in words.
        weights: Bits of its weights, 0 for floating point.
        activations: Bits of its activations, 0 for floating point.
        cost: Its cost in the unit of the report.
        bound: ``compute``, ``memory`` or empty.
        errors: Error for every candidate, or None.
        edges: Edges of the histogram of its weights; empty without one.
        counts: Weights between the edges.
        levels: The values that its weights may have after quantization, in the unit of ``edges``.
        format: Name of its weights' format.
    """

    name: str
    kind: str = ""
    weights: int = 0
    activations: int = 0
    cost: float = 0.0
    bound: str = ""
    errors: Sequence[float | None] = field(default_factory=tuple)
    edges: Sequence[float] = ()
    counts: Sequence[float] = ()
    levels: Sequence[float] = ()
    format: str = ""


def pareto(front: Sequence[Point], uniform: Sequence[Point], chosen: Point | None, gain: str, error: str) -> Chart:
    """The front with the uniform recipes beside it; ``customdata`` is a point's index among front, uniform, chosen."""
    traces = [
        _points(front, 0, "mixed precision", "lines+markers", OURS, 9, "circle"),
        _points(uniform, len(front), "uniform", "markers+text", OTHERS, 9, "square"),
    ]
    if chosen is not None:
        traces.append(_points([chosen], len(front) + len(uniform), "chosen", "markers", OURS, 17, "star"))
    return {
        "data": [trace for trace in traces if trace["x"]],
        "layout": {
            "xaxis": {"title": {"text": gain}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": error}, **_error_axis([p.error for p in [*front, *uniform]])},
            "hovermode": "closest",
            "height": 430,
        },
    }


def _points(
    points: Sequence[Point], first: int, name: str, mode: str, colour: str, size: int, symbol: str
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [p.gain for p in points],
        "y": [p.error for p in points],
        "text": [p.name for p in points],
        "textposition": "top center",
        "customdata": list(range(first, first + len(points))),
        "hovertemplate": "<b>%{text}</b><br>%{x:.3g}×, error %{y:.3g}<extra></extra>",
        "marker": {"color": colour, "size": size, "symbol": symbol},
        "line": {"color": colour, "width": 2},
    }


def _error_axis(errors: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis where the errors span more than a factor of thirty."""
    positive = [error for error in errors if error > 0]
    if len(positive) == len(errors) and positive and max(positive) > 30 * min(positive):
        return {"type": "log", "exponentformat": "power", "dtick": 1}
    return {"rangemode": "tozero"}


def strip(rows: Sequence[Row]) -> Chart:
    """Bits of weights and activations as two bands over the network."""
    values = {"activations": [row.activations for row in rows], "weights": [row.weights for row in rows]}
    names = [row.name for row in rows]
    text = [[_bits(bits) for bits in values[band]] for band in values]
    trace = {
        "type": "heatmap",
        "z": [[bits or None for bits in values[band]] for band in values],
        "y": list(values),
        "x": list(range(len(rows))),
        "customdata": [names, names],
        "text": text,
        "texttemplate": "%{text}" if len(rows) <= 40 else "",
        "hovertemplate": "<b>%{customdata}</b><br>%{y}: %{text}<extra></extra>",
        "colorscale": _discrete_scale(),
        "zmin": 1.5,
        "zmax": 8.5,
        "colorbar": {"tickvals": list(_COLOURS), "title": {"text": "bits"}, "thickness": 12, "tickfont": {"size": 10}},
        "xgap": 1,
        "ygap": 4,
    }
    layout = {
        "height": 250,
        "xaxis": {"title": {"text": "layers, from input to output"}, "showgrid": False},
        "yaxis": {"showgrid": False},
        "plot_bgcolor": GREY,
    }
    return {"data": [trace], "layout": layout}


def _bits(bits: int) -> str:
    return str(bits) if bits else "FP"


def _discrete_scale() -> list[list[Any]]:
    scale = []
    for index, colour in enumerate(_COLOURS.values()):
        scale += [[index / len(_COLOURS), colour], [(index + 1) / len(_COLOURS), colour]]
    return scale


def sensitivity(rows: Sequence[Row], candidates: Sequence[str], chosen: Sequence[int | None]) -> Chart:
    """How much the output suffers from every layer at every candidate; the chosen ones are marked."""
    logs = [[_log10(error) for error in row.errors] for row in rows]
    places = [(candidates[index], row.name) for row, index in zip(rows, chosen, strict=True) if index is not None]
    heat = {
        "type": "heatmap",
        "z": logs,
        "x": list(candidates),
        "y": [row.name for row in rows],
        "customdata": [[0 if error is None else error for error in row.errors] for row in rows],
        "hovertemplate": "<b>%{y}</b><br>%{x}: error %{customdata:.3g}<extra></extra>",
        "colorscale": "Cividis",
        "colorbar": {"title": {"text": "log₁₀ error"}, "thickness": 12},
        "name": "error",
    }
    marks = {
        "type": "scatter",
        "mode": "markers",
        "x": [x for x, _ in places],
        "y": [y for _, y in places],
        "marker": {"symbol": "circle-open", "size": 9, "color": OURS, "line": {"width": 2.5}},
        "hoverinfo": "skip",
        "name": "chosen",
        "showlegend": False,
    }
    height = max(_LEAST_ROW, 110 + _ROW * len(rows))
    axes = {
        "xaxis": {"side": "top", "title": {"text": "weights / activations"}, "type": "category"},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
    }
    return {"data": [heat, marks], "layout": {"height": height, **axes}}


def _log10(error: float | None) -> float | None:
    return None if error is None else log10(max(error, 1e-12))


def histogram(row: Row) -> Chart:
    """The weights of a layer with the levels that they are rounded to."""
    widths = [b - a for a, b in zip(row.edges, row.edges[1:], strict=False)]
    total = sum(row.counts) or 1
    density = [count / total / width for count, width in zip(row.counts, widths, strict=True)]
    top = max(density, default=1.0)
    inside = [level for level in row.levels if row.edges and row.edges[0] <= level <= row.edges[-1]]
    bars = {
        "type": "bar",
        "x": [(a + b) / 2 for a, b in zip(row.edges, row.edges[1:], strict=False)],
        "y": density,
        "width": widths,
        "marker": {"color": OTHERS, "opacity": 0.55, "line": {"width": 0}},
        "hovertemplate": "%{x:.3g}<extra></extra>",
        "name": "weights",
    }
    lines = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for level in inside for x in (level, level, None)],
        "y": [y for _ in inside for y in (0, 1.04 * top, None)],
        "line": {"color": OURS, "width": 1.4},
        "hovertemplate": "level %{x:.4g}<extra></extra>",
        "name": f"levels of {row.format}",
    }
    layout = {
        "height": 330,
        "bargap": 0,
        "xaxis": {"title": {"text": "weight / root mean square of its channel"}},
        "yaxis": {"title": {"text": "density"}, "rangemode": "tozero"},
    }
    return {"data": [bars, lines], "layout": layout}


def costs(rows: Sequence[Row], unit: str) -> Chart:
    """The cost of every layer, coloured by its bound."""
    colours = {"compute": OURS, "memory": OTHERS, "": OTHERS}
    names = {"compute": "compute-bound", "memory": "memory-bound", "": "layer"}
    traces = []
    for bound in colours:
        chosen = [row for row in rows if row.bound == bound]
        if chosen:
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": names[bound],
                    "x": [row.cost for row in chosen],
                    "y": [row.name for row in chosen],
                    "text": [f"{_bits(row.weights)}/{_bits(row.activations)}" for row in chosen],
                    "textposition": "outside",
                    "cliponaxis": False,
                    "customdata": [row.kind for row in chosen],
                    "hovertemplate": f"<b>%{{y}}</b><br>%{{customdata}}<br>%{{x:,.4g}} {unit}<extra></extra>",
                    "marker": {"color": colours[bound]},
                }
            )
    order = [row.name for row in rows]
    layout = {
        "height": max(_LEAST_ROW, 110 + _ROW * len(rows)),
        "xaxis": {"title": {"text": unit}},
        "yaxis": {
            "categoryorder": "array",
            "categoryarray": order,
            "autorange": "reversed",
            "automargin": True,
            "type": "category",
        },
        "bargap": 0.25,
    }
    return {"data": traces, "layout": layout}


def rivals(names: Sequence[str], decibels: Sequence[float], ours: Sequence[bool]) -> Chart:
    """Signal to quantization noise of the weights with every format at the chosen widths, best first."""
    order = sorted(range(len(names)), key=lambda index: -decibels[index])
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [names[i] for i in order],
        "x": [decibels[i] for i in order],
        "text": [f"{decibels[i]:.2f} dB" for i in order],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": [OURS if ours[i] else OTHERS for i in order]},
        "hovertemplate": "%{y}: %{x:.2f} dB<extra></extra>",
    }
    layout = {
        "height": 120 + 26 * len(names),
        "xaxis": {"title": {"text": "SQNR of the weights, dB"}},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "showlegend": False,
    }
    return {"data": [bars], "layout": layout}
