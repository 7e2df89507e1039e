"""Bars for a few quantized models side by side: one row of panels per network, one panel per measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dybit.errors import DyBitError
from dybit.report.histogram import matplotlib

_INK, _GREY, _LIGHT = "#1f2933", "#7b8794", "#e4e7eb"
_OURS, _OTHERS = "#c2410c", "#9fb3c8"
_HEIGHT, _BAR, _WIDTH = 0.75, 0.27, 8.6  # inches: head and foot of a panel, a bar, the figure


@dataclass(frozen=True)
class Measure:
    """A panel: a value for each model of a network.

    Attributes:
        title: Title of the panel.
        values: One for each model; None leaves its bar out.
        words: What to write at the end of each bar.
    """

    title: str
    values: Sequence[float | None]
    words: Sequence[str]


@dataclass(frozen=True)
class Network:
    """A row of panels.

    Attributes:
        title: Name of the network.
        models: Names of its models, from top to bottom; the last is highlighted.
        measures: The panels.
    """

    title: str
    models: Sequence[str]
    measures: Sequence[Measure]


def bars(networks: Sequence[Network]) -> Any:  # noqa: ANN401 - a matplotlib figure
    """Draws horizontal bars.

    Args:
        networks: From top to bottom; all have the same number of measures.

    Returns:
        A ``matplotlib.figure.Figure``; see :func:`dybit.report.histogram.save`.

    Raises:
        DyBitError: There is no network, or their numbers of measures differ.
        MissingExtraError: matplotlib is not installed.
    """
    counts = sorted({len(network.measures) for network in networks})
    if len(counts) != 1 or not counts[0]:
        raise DyBitError(f"networks must have the same number of measures, at least one, not {counts}")
    heights = [_HEIGHT + _BAR * len(network.models) for network in networks]
    figure = matplotlib("figure").Figure(figsize=(_WIDTH, sum(heights)), facecolor="white", layout="constrained")
    parts = figure.subfigures(len(networks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, network in zip(parts, networks, strict=True):
        part.suptitle(network.title, x=0.01, ha="left", size=11, weight="bold", color=_INK)
        panels = part.subplots(1, counts[0], sharey=True, squeeze=False)[0]
        for axes, measure in zip(panels, network.measures, strict=True):
            _draw(axes, measure)
        panels[0].set_yticks(range(len(network.models)), network.models, size=9, color=_INK)
        panels[0].invert_yaxis()
    return figure


def _draw(axes: Any, measure: Measure) -> None:  # noqa: ANN401
    last = len(measure.values) - 1
    for index, (value, words) in enumerate(zip(measure.values, measure.words, strict=True)):
        colour = _OURS if index == last else _OTHERS
        axes.barh(index, value or 0.0, color=colour, height=0.68)
        weight = "bold" if index == last else "normal"
        axes.annotate(
            words, (value or 0.0, index), xytext=(4, 0), textcoords="offset points", va="center", size=8.5,
            color=_INK, weight=weight,
        )  # fmt: skip
    axes.set_xlim(0, 1.35 * max([value for value in measure.values if value], default=1.0))
    axes.set_title(measure.title, loc="left", size=9, color=_GREY)
    axes.set_xticks([])
    axes.tick_params(left=False)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "left")
        spine.set_color(_LIGHT)
