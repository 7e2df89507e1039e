"""``dybit table``: the codes of a format with their bit fields, significands and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.text import Text

from dybit.cli.console import grid, guarded, out
from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.codebook import Codebook
from dybit.formats.format import MAX_BITS, MIN_BITS, Format, variants

_STYLES = {"sign": "bold red", "run": "bold yellow", "stop": "bold magenta", "fraction": "bold cyan"}
_SIDE_BY_SIDE = 5  # up to this width a plain overview fits a screen


@guarded
def table(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="BITS|NAME",
            help="A width of 2 to 8 bits, or the name of a format, such as s4r2, u4, nf4 or e2m1. [lists the formats]",
        ),
    ] = None,
    signed: Annotated[bool, typer.Option("--signed/--unsigned", help="Whether codes have a sign bit.")] = True,
    max_run: Annotated[int | None, typer.Option(help="Longest run of leading ones. [all lengths]")] = None,
    midrise: Annotated[bool, typer.Option("--midrise", help="The mid-rise variant: no zero.")] = False,
    spare: Annotated[
        bool, typer.Option("--spare", help="The spare variant: negative zero becomes 5/2 (2 at 2 bits).")
    ] = False,
) -> None:
    """Show all codes of a format with their bit fields and values, or list the formats.

    Values are in units of the scale.

    Example: dybit table 4 --signed, dybit table s4r2, dybit table nf4
    """
    if what is None:
        _list(signed)
        return
    if what.isdigit():
        bits = int(what)
        if max_run is None and not midrise and not spare:
            _overview(bits, signed)
            return
        _codes(Format(bits, signed, max_run, midrise, spare))  # type: ignore[arg-type]
        return
    if not signed or max_run is not None or midrise or spare:
        raise DyBitError(f"--unsigned, --max-run, --midrise and --spare go with a width, not with the name {what!r}")
    try:
        family = catalogue.family(what)
    except DyBitError as error:
        raise DyBitError(f"BITS|NAME {what!r}: {error}") from None
    if len(family.books) == 1:
        _codes(family.books[0])
        return
    console = out()
    console.print(f"{family.name}: {len(family.books)} formats of {family.bits} bits to choose from", soft_wrap=True)
    for book in family.books:
        _line(book)


def _list(signed: bool) -> None:
    """The names of the formats of every width."""
    console = out()
    for bits in range(MIN_BITS, MAX_BITS + 1):
        names = " ".join(family.name for family in catalogue.families(bits, signed))
        console.print(Text.assemble((f"{bits} bits  ", "bold"), names), soft_wrap=True)
    console.print("\nThe codes of one: dybit table nf4; all DyBit formats of a width: dybit table 4", style="dim")


def _overview(bits: int, signed: bool) -> None:
    """The plain variants of a width side by side, and the others in a line each."""
    formats = variants(bits, signed)
    plain = [book for book in formats if not book.midrise and not book.spare]
    console = out()
    kind = "signed" if signed else "unsigned"
    console.print(f"DyBit, {bits} bits, {kind}: values by code and longest run (max_run)", style="bold")
    _legend()
    if bits <= _SIDE_BY_SIDE:
        m = plain[0].magnitude_bits
        shown = grid("magnitude" if signed else "code", *(f">{_run_title(book, m)}" for book in plain))
        for code in range(1 << m):
            cells = [Text.assemble(_fields(book, code), f"  {_number(book.values[code]):>6}") for book in plain]
            shown.add_row(f"{code:0{m}b}", *cells)
        console.print(shown)
        if signed:
            console.print("Negative values: the same with the sign bit (top bit) set.", style="dim")
    else:
        for book in plain:
            _line(book)
    others = [book for book in formats if book.midrise or book.spare]
    if others:
        level = "2" if bits == MIN_BITS else "5/2"
        console.print(
            f"\nMid-rise (no zero) and spare (negative zero becomes {level}) variants, magnitudes:", style="bold"
        )
        for book in others:
            _line(book)
    console.print(f"\nAll codes of one of them: dybit table {plain[min(1, len(plain) - 1)].name}", style="dim")


def _run_title(book: Format, m: int) -> str:
    known = {1: "integer", 2: f"E2M{m - 2}"}.get(book.max_run, "") if m >= 2 else "integer"
    known = "DyBit" if book.max_run == m and m >= 2 else known
    return f"{book.name}" + (f" ({known})" if known else "")


def _codes(book: Codebook) -> None:
    console = out()
    dybit = isinstance(book, Format)
    console.print(f"{book.name}: {book.bits} bits, {len(book.levels)} levels", style="bold")
    if dybit:
        _legend()
    columns = [">code", "bits", *([">significand"] if dybit else []), ">value"]
    shown = grid(*columns)
    for code in range(1 << book.bits):
        value = _number(book.values[code])
        if isinstance(book, Format):
            shown.add_row(str(code), _fields(book, code), str(int(book.significands[code])), value)
        else:
            shown.add_row(str(code), f"{code:0{book.bits}b}", value)
    console.print(shown)
    if isinstance(book, Format):
        step = _number(book.step)
        console.print(f"value = significand · {step}; largest significand {book.max_significand}", style="dim")


def _line(book: Codebook) -> None:
    """A format in one line: its levels, or its magnitudes where both sides are alike."""
    levels: Sequence[float] = book.levels.tolist()
    prefix = ""
    if book.symmetric:
        prefix, levels = "± ", [level for level in levels if level >= 0]
    elif isinstance(book, Format) and book.spare:
        positive = [level for level in book.levels.tolist() if -level in book.levels.tolist() and level >= 0]
        prefix, levels = "± ", positive
    words = [_number(level) for level in levels]
    if len(words) > 12:
        words = [*words[:5], "…", *words[-5:]]
    spare = isinstance(book, Format) and book.spare
    extra = f" and +{_number(book.values[1 << (book.bits - 1)])} (spare)" if spare else ""
    out().print(Text.assemble((f"  {book.name:<10}", "bold"), prefix, "  ".join(words), extra), soft_wrap=True)


def _fields(book: Format, code: int) -> Text:
    fields = book.fields(code)
    return Text.assemble(*((getattr(fields, name), style) for name, style in _STYLES.items()))


def _legend() -> None:
    out().print(Text.assemble("fields: ", *(part for name, style in _STYLES.items() for part in ((name, style), " "))))


def _number(value: float) -> str:
    if value != value:
        return "unused"
    return f"{value + 0.0:.6g}"
