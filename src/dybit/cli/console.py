"""Where the command line speaks: results on stdout, progress and notes on stderr, errors as one sentence."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dybit.errors import DyBitError

USAGE_ERROR, INTERRUPTED = 2, 130
_PIPE_WIDTH = 160  # of tables that go to a file or to another program
_C = TypeVar("_C", bound=Callable[..., None])


def out() -> Console:
    """Makes the console of results. It is not cached, since tests and pipes replace ``sys.stdout``."""
    return _console(sys.stdout)


def err() -> Console:
    """The console of progress, notes and errors."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:  # noqa: ANN401
    # Where nobody looks, rich would cut lines at 80 columns.
    wide = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=stream, width=wide, highlight=False, emoji=False, markup=False)


def note(text: str) -> None:
    """Prints a note to stderr."""
    err().print(Text(text, style="dim"), soft_wrap=True)


def fail(message: str) -> None:
    """Prints an error to stderr as one line."""
    line = " ".join(message.split())
    err().print(Text.assemble(("dybit: ", "bold red"), line), soft_wrap=True)


def grid(*columns: str, title: str | None = None) -> Table:
    """A table with a plain head rule; a column whose name starts with ``>`` is aligned to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.lstrip(">"), justify="right" if right else "left", header_style="bold", no_wrap=right)
    return table


def size(count: float) -> str:
    """A number of bytes in words, in decimal units: ``"12.3 MB"``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def guarded(command: _C) -> _C:
    """Turns the errors of a command into one sentence and exit code 2, and Ctrl-C into one line and exit code 130."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        try:
            with warnings.catch_warnings():
                _show_own_warnings()
                command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            fail(str(stop) or "interrupted; nothing half-written was left behind")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except (DyBitError, OSError, MemoryError) as error:
            if os.environ.get("DYBIT_DEBUG", "0") not in ("", "0"):
                traceback.print_exc()
            fail(_with_options(_sentence(error), kwargs))
            raise typer.Exit(USAGE_ERROR) from None

    return wrapper  # type: ignore[return-value]


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, DyBitError) and error.strerror:
        return f"{str(error.filename)!r}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _with_options(message: str, arguments: Mapping[str, object]) -> str:
    """Names the options of a command where an error of the library names an argument, as ``group_size=8``.

    Args:
        message: The error.
        arguments: The arguments of the command.
    """
    if message.startswith("--recipe"):  # names fields of the file
        return message

    def option(match: re.Match[str]) -> str:
        name, value = match[1], match[2].strip("'")
        if name not in arguments:
            return match[0]
        variable = value.isidentifier() and match[2] == value and value != "None"
        return f"--{name.replace('_', '-')}" + ("" if variable else f" {value}")

    message = re.sub(r"(?<![\w.'-])([a-z_]+)=('[^']*'|\w+)", option, message)
    name = message.partition(" must be ")[0]
    if name in arguments and message.find(f", not {arguments[name]!r}") > 0:
        rest = message[len(name) :].replace("one of null, ", "one of ").replace(" or None, ", ", ")
        return f"--{name.replace('_', '-')}{rest}"
    return message


def _show_own_warnings() -> None:
    """Shows dybit's warnings as notes; those of other libraries are not for the user of a command."""
    previous = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:  # noqa: ANN401
        if category.__module__.startswith("dybit."):
            note(f"note: {message}")
        else:
            previous(message, category, *rest, **more)

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"dybit\..*")
    warnings.showwarning = show


class Bar:
    """A progress bar with the time left, or plain lines where stderr is no terminal."""

    def __init__(self, progress: Progress | None, title: str) -> None:
        self._progress, self._title, self._last = progress, title, ""
        self._task: TaskID | None = None

    def start(self, title: str, total: float | None = None) -> None:
        """Begins a step; ``total`` of None where its length is unknown."""
        self._title = title
        if self._progress is None:
            note(f"{title} …")
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(title, total=total, text="")

    def update(self, done: float, total: float | None = None, text: str = "") -> None:
        """Says how far the step is."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total, text=text[-36:])


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Bar]:
    """Shows a bar on stderr while the body runs."""
    console = err()
    if not console.is_terminal:
        bar = Bar(None, title)
        bar.start(title, total)
        yield bar
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("[dim]{task.fields[text]}"),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        bar = Bar(shown, title)
        bar.start(title, total)
        yield bar
