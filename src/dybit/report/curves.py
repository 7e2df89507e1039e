"""Error against bits, a line for every format and algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dybit.errors import DyBitError
from dybit.report.histogram import matplotlib

_INK, _GREY, _LIGHT = "#1f2933", "#7b8794", "#e4e7eb"
_OURS = ("#c2410c", "#ea8a4f", "#7c2d12", "#f5b78a")
_OTHERS = ("#486581", "#829ab1", "#102a43", "#7b8794", "#2f855a", "#81c995")


def curves(
    lines: Mapping[str, Sequence[tuple[float, float, str]]],
    title: str,
    xlabel: str,
    ylabel: str,
    logarithmic: bool = False,
) -> Any:  # noqa: ANN401 - a matplotlib figure
    """Draws lines of points.

    Args:
        lines: By name, the points: horizontal, vertical and what to write beside. Names that begin with ``dybit`` are
            highlighted.
        title: Title.
        xlabel: What the horizontal axis counts.
        ylabel: What the vertical axis counts.
        logarithmic: Whether the vertical axis is.

    Raises:
        DyBitError: There is no point.
        MissingExtraError: matplotlib is not installed.
    """
    if not any(lines.values()):
        raise DyBitError("curves need at least one point")
    figure = matplotlib("figure").Figure(figsize=(8.6, 5.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    counts = {True: 0, False: 0}
    for name, points in lines.items():
        ours = name.startswith("dybit")
        colours = _OURS if ours else _OTHERS
        colour = colours[counts[ours] % len(colours)]
        counts[ours] += 1
        xs, ys, texts = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, "o-", color=colour, label=name, linewidth=2.2 if ours else 1.3, markersize=4.5)
        place = {"xytext": (-5, 4), "ha": "right"} if ours else {"xytext": (5, -9)}  # beside a line that rises
        for x, y, text in zip(xs, ys, texts, strict=True):
            axes.annotate(text, (x, y), textcoords="offset points", size=6.5, color=colour, **place)
    if logarithmic and all(y > 0 for points in lines.values() for _, y, _ in points):
        axes.set_yscale("log")
    axes.set_title(title, loc="left", size=12, weight="bold", color=_INK)
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.grid(color=_LIGHT, linewidth=0.8)
    axes.tick_params(colors=_GREY, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_color(_LIGHT)
    axes.legend(frameon=False, fontsize=8.5)
    return figure
