"""``dybit report``: one page about a search, from the directory that it left."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dybit.cli.console import guarded, out, size
from dybit.errors import DyBitError
from dybit.safe_files import check_regular

if TYPE_CHECKING:
    from dybit.report.charts import Point, Row
    from dybit.report.search_page import SearchReport

_Document = Mapping[str, Any]
_AXIS = 40  # characters that fit beside an axis


@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory that dybit search wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page, a single file.")] = Path(
        "report.html"
    ),
) -> None:
    """Write an HTML page about a search.

    It shows the front of recipes, rival formats, and the bits, sensitivity, cost and levels of every layer.

    Example: dybit report run -o report.html
    """
    from dybit.mixed_precision.run_directory import read_run
    from dybit.report.search_page import write_report

    if output.suffix.lower() not in (".html", ".htm"):
        raise DyBitError(f"--output must end in .html, not {str(output)!r}")
    document = read_run(run)
    try:
        write_report(output, describe(document, run))
    except DyBitError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, ArithmeticError) as error:
        raise DyBitError(f"{str(run / 'search.json')!r} is not what dybit search wrote: {error!r:.200}") from None
    out().print(f"wrote {output}, {size(output.stat().st_size)}", soft_wrap=True)


def describe(document: _Document, run: Path) -> SearchReport:
    """The part of a run that a page shows.

    Args:
        document: What :func:`dybit.mixed_precision.run_directory.read_run` returned.
        run: Its directory, which holds the recipes of the front.
    """
    from dybit.report.search_page import SearchReport

    cost = document["costs"][0]
    bits = [tuple(candidate["bits"]) for candidate in document["candidates"]]
    layers = document["layers"]
    names = [layer["name"] for layer in layers]
    result = _point(document["result"], cost, names, bits, run)
    per = f" of {cost['name']}" if cost["unit"] == "bytes" else ""
    gain = f"times fewer bytes than {cost['base_name']}" if per else f"times as fast as {cost['base_name']}"
    error = "measured" if document["result"]["error"] is not None else "estimated"
    low = sum(1 for width in result.weights if 0 < width < 8)
    shapes = document["kind"] == "shapes"
    return SearchReport(
        title=f"{document['model']} at {result.gain:.2f} {gain}",
        subtitle=f"{len(bits)} candidates for each of {len(layers)} layers, in {len(document['groups'])} groups; "
        + ("shapes only: errors measure nothing" if shapes else f"errors estimated by {document['sensitivity']}")
        + _covered(document),
        headline=[
            *_headline(document),
            (f"{document['error_unit']}, {error}", f"{result.error:.3g}"),
            ("layers below 8 bits", f"{low} of {len(layers)}"),
        ],
        command=shlex.join(document["command"] or ["dybit.search(…)"]),
        machine="; ".join(f"{table['name']}: {table['note']}" for table in document["costs"] if table["note"]),
        gain=gain,
        error=document["error_unit"] if len(document["error_unit"]) <= _AXIS else "error",
        unit=cost["unit"],
        front=sorted((_point(point, cost, names, bits, run) for point in document["pareto"]), key=lambda p: p.gain),
        uniform=[
            replace(found, name=found.name.removeprefix("uniform "))
            for found in (_point(point, cost, names, bits, run) for point in document["uniform"])
        ],
        chosen=result,
        rows=[_row(layer, cost, bits) for layer in layers],
        candidates=[candidate["name"] for candidate in document["candidates"]],
        choices=[layer["chosen"] for layer in layers],
        rivals=[(rival["name"], rival["sqnr"], rival["dybit"]) for rival in document["rivals"]],
    )


def _headline(document: _Document) -> list[tuple[str, str]]:
    """Every cost of the result against its base."""
    found = []
    for cost in document["costs"]:
        value = document["result"]["measured"].get(cost["name"], document["result"]["costs"][cost["name"]])
        after, before = _amount(value, cost["unit"]), _amount(cost["base"], cost["unit"])
        found.append((f"{cost['name']}, from {before} ({cost['base_name']})", after))
        better = "smaller" if cost["unit"] == "bytes" else "faster"
        found.append((f"{better} than {cost['base_name']}", f"{cost['base'] / value:.2f}×"))
    return found


def _covered(document: _Document) -> str:
    """The end of a sentence: the share of the weights that is quantized, and what is not; nothing for shapes."""
    from dybit.models.coverage import Coverage

    stored = document.get("coverage")
    return "" if stored is None else f"; {Coverage.from_dict(stored)}"


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return size(value)
    return f"{value * 1e3:.2f} ms" if unit == "seconds" else f"{value:,.0f} {unit}"


def _point(
    point: _Document, cost: _Document, names: Sequence[str], bits: Sequence[tuple[int | None, ...]], run: Path
) -> Point:
    from dybit.report.charts import Point

    chosen = [bits[point["choice"][name]] for name in names]
    file = point.get("recipe")
    text = ""
    if file is not None:
        path = run / file
        if run.resolve() not in path.resolve().parents:
            raise DyBitError(f"recipe {file!r} of a point lies outside of {str(run)!r}")
        text = check_regular(path).read_text(encoding="utf-8")
    value = point["measured"].get(cost["name"], point["costs"][cost["name"]])
    error = point["estimated_error"] if point["error"] is None else point["error"]
    weights, activations = ([pair[side] or 0 for pair in chosen] for side in (0, 1))
    return Point(point["name"], cost["base"] / value, error, text, weights, activations)


def _row(layer: _Document, cost: _Document, bits: Sequence[tuple[int | None, ...]]) -> Row:
    from dybit.report.charts import Row

    chosen = layer["chosen"]
    details = layer["details"].get(cost["name"])
    histogram = layer.get("histogram") or {}
    counts = histogram.get("counts", ())
    step = (histogram["high"] - histogram["low"]) / len(counts) if counts else 0.0
    return Row(
        name=layer["name"],
        kind=" + ".join(" × ".join(map(str, shape)) for shape in layer.get("shape", ())),
        weights=bits[chosen][0] or 0,
        activations=bits[chosen][1] or 0,
        cost=layer["costs"][cost["name"]][chosen] or 0.0,
        bound=str(details[chosen].get("bound", "")) if details else "",
        errors=layer["errors"],
        edges=[histogram["low"] + step * index for index in range(len(counts) + 1)] if counts else (),
        counts=counts,
        levels=histogram.get("levels", ()),
        format=histogram.get("format", "floating point"),
    )
