"""The report of a search: one HTML page with its charts, that needs no other file and no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from dybit.errors import DyBitError, MissingExtraError
from dybit.report import charts
from dybit.report.charts import Chart, Point, Row
from dybit.safe_files import write_file


@dataclass(frozen=True)
class SearchReport:
    """The contents of a report. Empty parts are left out.

    Attributes:
        title: Heading.
        subtitle: A sentence below it.
        headline: Names and values of the figures that come first.
        command: The command line that made it.
        machine: What it ran on.
        gain: What the front's horizontal axis counts.
        error: What its vertical axis counts.
        unit: The unit of the layers' cost.
        front: The Pareto front.
        uniform: Recipes with one width for all layers.
        chosen: The recipe that was chosen.
        rows: The layers in order of execution.
        candidates: Names of the candidates that ``rows`` has errors for.
        choices: Index of every layer's chosen candidate, or None.
        rivals: (name, SQNR in dB, whether it is a DyBit format) of every format compared.
    """

    title: str
    subtitle: str = ""
    headline: Sequence[tuple[str, str]] = ()
    command: str = ""
    machine: str = ""
    gain: str = "speedup"
    error: str = "error"
    unit: str = ""
    front: Sequence[Point] = ()
    uniform: Sequence[Point] = ()
    chosen: Point | None = None
    rows: Sequence[Row] = ()
    candidates: Sequence[str] = ()
    choices: Sequence[int | None] = ()
    rivals: Sequence[tuple[str, float, bool]] = field(default_factory=tuple)


@dataclass(frozen=True)
class _Part:
    name: str
    title: str
    text: str
    chart: Chart | None = None
    tall: bool = False
    choices: tuple[str, ...] = ()


def write_report(path: Path, report: SearchReport) -> None:
    """Writes the page, at once or not at all.

    Args:
        path: The HTML file.
        report: What it shows.

    Raises:
        DyBitError: The file cannot be written.
        MissingExtraError: plotly is not installed.
    """
    parts = _parts(report)
    drawn = {part.name: part.chart for part in parts if part.chart is not None}
    shown = [row for row in report.rows if row.edges]
    drawn |= {f"histogram-{index}": charts.histogram(row) for index, row in enumerate(shown)}
    points = [*report.front, *report.uniform, *([report.chosen] if report.chosen else [])]
    source = files("dybit.report").joinpath("search.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = environment.from_string(source).render(
        title=report.title,
        subtitle=report.subtitle,
        headline=[{"name": name, "value": value} for name, value in report.headline],
        parts=parts,
        command=report.command,
        machine=report.machine,
        plotly=_plotly(),
        data=_embed({"charts": drawn, "points": [asdict(point) for point in points]}),
    )
    _write(path, text)


def _parts(report: SearchReport) -> list[_Part]:
    parts = []
    rows = report.rows
    if report.front or report.uniform:
        parts.append(
            _Part(
                "pareto",
                "Error against speed",
                "Every point is a recipe: click it to see it. Right and down is better.",
                charts.pareto(report.front, report.uniform, report.chosen, report.gain, report.error),
            )
        )
    if rows:
        text = "What every layer was given: weights above, activations below."
        parts.append(_Part("strip", "Bits per layer", text, charts.strip(rows)))
    if rows and report.candidates:
        text = "How much the output suffers when one layer alone is quantized; circles are what was chosen."
        chart = charts.sensitivity(rows, report.candidates, report.choices)
        parts.append(_Part("sensitivity", "Sensitivity", text, chart, tall=True))
    if any(row.cost for row in rows):
        text = "Where the time goes, with weight/activation bits at the end of every bar."
        parts.append(_Part("costs", "Cost of every layer", text, charts.costs(rows, report.unit), tall=True))
    names = tuple(row.name for row in rows if row.edges)
    if names:
        text = "How the weights of a layer are spread, and the levels that they were rounded to."
        parts.append(_Part("histogram", "Weights and levels", text, choices=names))
    if report.rivals:
        text = "The same weights, widths and scales with other formats: DyBit in colour."
        chart = charts.rivals(*(list(column) for column in zip(*report.rivals, strict=True)))
        parts.append(_Part("rivals", "Rival formats", text, chart))
    return parts


def _embed(value: object) -> str:
    """JSON that can stand in a script element: no ``</script>`` and no comment can begin in it."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise DyBitError(f"a figure of the report is not finite: {error}") from error
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtraError('reports need plotly: pip install "dybit[report]"') from None
    text: Any = get_plotlyjs()
    return str(text)


def _write(path: Path, text: str) -> None:
    try:
        write_file(path, text)
    except OSError as error:
        raise DyBitError(f"output must be a file that can be written, not {str(path)!r}: {error}") from error
