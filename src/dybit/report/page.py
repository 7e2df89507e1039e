"""One self-contained HTML page: a title, notes, a picture as SVG and a table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2


def write_page(
    path: Path,
    *,
    title: str,
    notes: Sequence[str],
    svg: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
) -> None:
    """Writes a page that needs no other file and no network.

    Args:
        path: Where to.
        title: Title and heading.
        notes: Paragraphs above the picture.
        svg: The picture, an ``<svg>`` element that is trusted; all else is escaped.
        columns: Heads of the table; one that starts with ``>`` is aligned to the right.
        rows: A CSS class (``dybit``, ``bound`` or ``""``) and the cells of every row.
    """
    source = files("dybit.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = environment.from_string(source).render(title=title, notes=notes, svg=svg, columns=columns, rows=rows)
    path.write_text(text, encoding="utf-8")
