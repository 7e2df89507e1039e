"""The application: the commands under their names, and the entry point."""

from __future__ import annotations

import os
import re
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from dybit.cli.accelerator import rtl, simulate
from dybit.cli.bench import bench
from dybit.cli.chat import chat
from dybit.cli.code_table import table
from dybit.cli.compare import compare
from dybit.cli.console import INTERRUPTED, USAGE_ERROR, fail, out
from dybit.cli.demo import demo
from dybit.cli.doctor import doctor
from dybit.cli.evaluate import evaluate
from dybit.cli.export import export, import_
from dybit.cli.info import info
from dybit.cli.quantize import quantize
from dybit.cli.report import report
from dybit.cli.search import search

app = typer.Typer(
    name="dybit",
    help="Quantize PyTorch models to 2 to 8 bits per weight, and run them.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo)
app.command("table")(table)
app.command("compare")(compare)
app.command("quantize")(quantize)
app.command("evaluate")(evaluate)
app.command("bench")(bench)
app.command("chat")(chat)
app.command("search")(search)
app.command("report")(report)
app.command("export")(export)
app.command("import")(import_)
app.command("info")(info)
app.command("doctor")(doctor)
app.command("simulate")(simulate)
app.command("rtl")(rtl)


def _show_version(wanted: bool) -> None:
    if wanted:
        out().print(f"dybit {installed_version()}")
        raise typer.Exit


def installed_version() -> str:
    """The version of the installed package."""
    try:
        return version("dybit")
    except PackageNotFoundError:
        return "unknown"


@app.callback()
def _options(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Quantize PyTorch models to 2 to 8 bits per weight, and run them.

    Results go to stdout, progress and notes to stderr. Errors are one sentence (exit code 2); DYBIT_DEBUG=1 shows
    where they come from. Start with: dybit demo
    """
    # Threads of OpenMP that wait by spinning make a shared machine several times slower. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> int:
    """Runs the command line and returns the exit code."""
    try:
        return app(standalone_mode=False) or 0
    except KeyboardInterrupt:
        fail("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # Typer's own errors of usage, by their interface: it has moved its classes between versions.
        message = getattr(error, "format_message", None)
        if message is None:
            if os.environ.get("DYBIT_DEBUG", "0") not in ("", "0"):
                traceback.print_exc()
            fail(f"{type(error).__name__}: {error} (a defect of dybit; DYBIT_DEBUG=1 shows where)")
            return 1
        fail(_usage(message()))
        return USAGE_ERROR


def _usage(message: str) -> str:
    """An error of usage, with the help to look at."""
    near = re.fullmatch(r"(.+?) \(Possible options?: (.+)\)\.?", message)
    if near is not None:
        message = f"{near[1]}. Did you mean {near[2].replace(', ', ' or ')}?"
    if not message.endswith((".", "?", "!")):
        message += "."
    command = next((word for word in sys.argv[1:2] if word in (known.name for known in app.registered_commands)), "")
    return f"{message} Try: {f'dybit {command}'.strip()} --help"
