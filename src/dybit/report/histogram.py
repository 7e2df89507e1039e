"""A histogram of weights above the levels of the formats that they are rounded to."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dybit.errors import DyBitError, MissingExtraError

SUFFIXES = (".png", ".svg")

_INK, _GREY, _LIGHT = "#1f2933", "#7b8794", "#e4e7eb"
_OURS, _OTHERS, _BOUND = "#c2410c", "#486581", "#9aa5b1"
_BARS = "#bcd3e6"
_DOTS_PER_INCH = 160


@dataclass(frozen=True)
class FormatRow:
    """A format in a picture.

    Attributes:
        name: What the row is called.
        levels: Its levels in the unit of the histogram: float64 of shape (levels,).
        note: A few words at the end of the row, such as its SQNR.
        detail: What to add to the name where the levels cross the bars, such as the table that was chosen.
        kind: ``dybit`` (highlighted), ``rival`` or ``bound``.
    """

    name: str
    levels: NDArray[np.float64]
    note: str = ""
    detail: str = ""
    kind: str = "rival"


def histogram(
    weights: NDArray[np.floating],
    rows: Sequence[FormatRow],
    title: str,
    subtitle: str = "",
    xlabel: str = "weight / root mean square of its channel",
    reach: float | None = None,
) -> Any:  # noqa: ANN401 - a matplotlib figure
    """Draws a histogram with, below it, a row of marks for every format.

    The levels of the best DyBit format, or of the best, cross the bars.

    Args:
        weights: Samples of any shape.
        rows: The formats, best first.
        title: Title.
        subtitle: A line below it.
        xlabel: What the horizontal axis counts.
        reach: Half the width of the picture, in its unit; None takes what holds 99.9 % of the weights.

    Returns:
        A ``matplotlib.figure.Figure``; see :func:`save` and :func:`to_svg`.

    Raises:
        DyBitError: There is no weight or no format.
        MissingExtraError: matplotlib is not installed.
    """
    sample = np.asarray(weights, dtype=np.float64).ravel()
    if sample.size == 0 or not rows:
        raise DyBitError(f"a histogram needs weights and formats, not {sample.size} and {len(rows)} of them")
    figure_class = matplotlib("figure").Figure
    if reach is None:
        reach = 1.12 * max(float(np.quantile(np.abs(sample), 0.999)), 1e-30)
    bars, strip = 2.7, 0.5 + 0.27 * len(rows)
    figure = figure_class(figsize=(8.6, bars + strip + 1.2), facecolor="white")
    figure.subplots_adjust(
        left=0.175, right=0.845, top=1 - 0.78 / (bars + strip + 1.2), bottom=0.55 / (bars + strip + 1.2)
    )
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[bars, strip], gridspec_kw={"hspace": 0.05})
    _draw_bars(top, sample, next((row for row in rows if row.kind == "dybit"), rows[0]), reach)
    _draw_rows(below, rows, reach)
    below.set_xlabel(xlabel, color=_INK)
    below.set_xlim(-reach, reach)
    figure.text(0.02, 0.985, title, size=13, weight="bold", color=_INK, va="top")
    figure.text(0.02, 0.985 - 0.31 / (bars + strip + 1.2), subtitle, size=9.5, color=_GREY, va="top")
    return figure


def _draw_bars(axes: Any, sample: NDArray[np.float64], first: FormatRow, reach: float) -> None:  # noqa: ANN401
    heights, edges = np.histogram(sample, bins=161, range=(-reach, reach))
    density = heights / (sample.size * (edges[1] - edges[0]))
    axes.bar(edges[:-1], density, width=np.diff(edges), align="edge", color=_BARS, linewidth=0)
    for level in first.levels[np.abs(first.levels) <= reach]:
        axes.axvline(level, color=_colour(first), linewidth=1.1, alpha=0.85)
    axes.set_ylabel("density", color=_INK)
    axes.set_ylim(0, float(density.max()) * 1.06)
    label = f"lines: levels of {first.name}{f' ({first.detail})' if first.detail else ''}"
    axes.text(1, 1.02, label, transform=axes.transAxes, ha="right", va="bottom", size=8.5, color=_colour(first))
    axes.tick_params(bottom=False, colors=_GREY, labelsize=8.5)
    _frame(axes, "left", "bottom")


def _draw_rows(axes: Any, rows: Sequence[FormatRow], reach: float) -> None:  # noqa: ANN401
    for index, row in enumerate(rows):
        y = len(rows) - 1 - index
        colour = _colour(row)
        axes.axhline(y, color=_LIGHT, linewidth=0.8, zorder=0)
        inside = row.levels[np.abs(row.levels) <= reach]
        axes.plot(inside, np.full(inside.size, y), "|", color=colour, markersize=11, markeredgewidth=1.6)
        for side in (-1, 1):  # levels beyond the picture
            beyond = int(np.count_nonzero(side * row.levels > reach))
            if beyond:
                axes.annotate(
                    f"+{beyond} outside", (side * reach, y), xytext=(-side * 3, 3), textcoords="offset points", size=7,
                    ha="right" if side > 0 else "left", color=colour,
                )  # fmt: skip
        weight = "bold" if row.kind == "dybit" else "normal"
        style: dict[str, Any] = {"va": "center", "size": 9, "color": colour, "weight": weight}
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(row.name, (0, y), xytext=(-8, 0), ha="right", **place, **style)
        axes.annotate(row.note, (1, y), xytext=(8, 0), ha="left", **place, **style)
    axes.set_ylim(-0.8, len(rows) - 0.3)
    axes.set_yticks([])
    axes.tick_params(colors=_GREY, labelsize=8.5)
    _frame(axes, "bottom")


def _frame(axes: Any, *kept: str) -> None:  # noqa: ANN401
    for name, spine in axes.spines.items():
        spine.set_visible(name in kept)
        spine.set_color(_LIGHT)


def _colour(row: FormatRow) -> str:
    return {"dybit": _OURS, "bound": _BOUND}.get(row.kind, _OTHERS)


def check_path(path: Path) -> None:
    """Checks, before any work, that a picture can be written to a path.

    Raises:
        DyBitError: Its suffix is neither ``.png`` nor ``.svg``, or its folder does not exist.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DyBitError(f"the picture's path must end in {' or '.join(SUFFIXES)}, not {str(path)!r}")
    if not path.parent.is_dir():
        raise DyBitError(f"the folder of {str(path)!r} does not exist")
    matplotlib("figure")


def save(figure: Any, path: Path) -> None:  # noqa: ANN401
    """Writes a figure as PNG or SVG, by the path's suffix."""
    # Rendered before the file is opened: an error leaves no half of it.
    data = to_svg(figure).encode() if path.suffix.lower() == ".svg" else _render(figure, "png")
    path.write_bytes(data)


def to_svg(figure: Any) -> str:  # noqa: ANN401
    """A figure as an SVG element."""
    with matplotlib().rc_context({"svg.fonttype": "none", "svg.hashsalt": "dybit", "font.family": "sans-serif"}):
        text = _render(figure, "svg").decode()
    return text[text.index("<svg") :]


def _render(figure: Any, kind: str) -> bytes:  # noqa: ANN401
    stream = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": "dybit"}
    figure.savefig(stream, format=kind, dpi=_DOTS_PER_INCH, facecolor="white", metadata=metadata)
    return stream.getvalue()


def matplotlib(part: str = "") -> Any:  # noqa: ANN401
    """The package matplotlib, or a part of it.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(f"matplotlib.{part}" if part else "matplotlib")
    except ImportError:
        raise MissingExtraError('pictures need matplotlib: pip install "dybit[plot]"') from None
