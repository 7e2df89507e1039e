"""``dybit simulate`` and ``dybit rtl``: the accelerator's cycles and its Verilog."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dybit.cli.console import guarded, out
from dybit.errors import DyBitError

if TYPE_CHECKING:
    from rich.table import Table

    from dybit.accelerator.simulate import Cost
    from dybit.workloads.workload import Workload

_Config = Annotated[
    Path | None, typer.Option("--config", metavar="TOML", help="The accelerator's parameters; defaults: 32 x 32.")
]


@guarded
def simulate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A built-in network such as resnet50, a workload's .json, or module:function (with --data).",
        ),
    ],
    weights: Annotated[int, typer.Option(help="Bits of a weight code, 2 to 8.")] = 4,
    activations: Annotated[int, typer.Option(help="Bits of an activation code, 2 to 8.")] = 4,
    config: _Config = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the layers as CSV.")] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="module:function of batches; the first one traces a torch model."),
    ] = None,
) -> None:
    """Count the cycles of a network on the accelerator.

    It also shows the DRAM traffic of every layer and the speedup over 8-bit weights and activations.

    Example: dybit simulate resnet50 --weights 4 --activations 4
    """
    table, totals = simulate_command(_workload(model, data), weights, activations, config, csv)
    console = out()
    console.print(table)
    console.print(totals, soft_wrap=True)


@guarded
def rtl(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The Verilog file.")],
    rows: Annotated[int | None, typer.Option(help="Rows of the array.")] = None,
    cols: Annotated[int | None, typer.Option(help="Columns of the array.")] = None,
    config: _Config = None,
) -> None:
    """Write the accelerator as synthesizable Verilog.

    It needs the extra dybit[rtl].

    Example: dybit rtl --rows 16 --cols 16 -o accelerator.v
    """
    out().print(rtl_command(output, rows, cols, config), soft_wrap=True)


def _workload(model: str, data: str | None) -> str | Workload:
    """The word itself where it names a workload; else a torch model, traced on the first batch of the data."""
    from dybit.cli.sources import is_reference, load_batches, load_model

    if not is_reference(model):
        if data is not None:
            raise DyBitError(f"--data {data!r} is for a torch model, and MODEL {model!r} is not module:function")
        return model
    if data is None:
        raise DyBitError(f"MODEL {model!r} is a torch model: give --data module:function with a batch to trace it")
    from dybit.measure.trace import trace
    from dybit.models.running import run_batch

    network = load_model(model)
    batch = load_batches(data, "--data", split="evaluation", limit=1)[0]
    run_batch(network, batch, "the first batch of --data")  # says what is wrong in one sentence
    named = batch if isinstance(batch, dict) else {}
    inputs = () if named else batch if isinstance(batch, tuple | list) else (batch,)
    return trace(network, *inputs, name=model, **named)


def table(cost: Cost) -> Table:
    """Returns the layers as a table for the terminal."""
    from rich.table import Table

    config = cost.config
    title = f"{cost.workload.name} on {config.rows} x {config.columns}, {config.dram_bytes_per_cycle:g} bytes per cycle"
    grid = Table(title=title)
    grid.add_column("layer", overflow="fold")
    for name in ("M x K x N", "bits", "folds", "compute", "memory", "cycles", "use", "bound"):
        grid.add_column(name, justify="right")
    for layer in cost.layers:
        of = layer.layer
        groups = f" x {of.groups}" if of.groups > 1 else ""
        grid.add_row(
            of.name,
            f"{of.m} x {of.k} x {of.n}{groups}",
            f"{layer.bits[0]}/{layer.bits[1]}",
            f"{layer.folds:,}",
            f"{layer.compute_cycles:,}",
            f"{layer.memory_cycles:,}",
            f"{layer.cycles:,}",
            f"{layer.utilization:.0%}",
            layer.bound,
        )
    return grid


def simulate_command(
    model: str | Workload,
    weights: int = 4,
    activations: int = 4,
    config: str | Path | None = None,
    csv: str | Path | None = None,
) -> tuple[Table, str]:
    """Does the work of ``dybit simulate``; the caller prints what is returned.

    Args:
        model: Name of a built-in network, path of a workload's JSON, or a workload.
        weights: Width of the weight codes.
        activations: Width of the activation codes.
        config: Path of a TOML file; the defaults if None.
        csv: Path of a CSV file to write, if any.

    Returns:
        The table of the layers, and the totals with the speedup over 8/8 on the same array.

    Raises:
        DyBitError: Something is wrong with the model, the widths or a file.
    """
    from dybit.accelerator.config import Config
    from dybit.accelerator.report import BASE, summary, write_csv
    from dybit.accelerator.simulate import simulate
    from dybit.workloads.networks import find_workload

    workload = find_workload(model) if isinstance(model, str) else model
    machine = Config() if config is None else Config.load(config)
    cost, base = (simulate(workload, bits, machine) for bits in ((weights, activations), BASE))
    if csv is not None:
        write_csv(cost, csv)
    return table(cost), summary(cost, base)


def rtl_command(
    output: str | Path, rows: int | None = None, columns: int | None = None, config: str | Path | None = None
) -> str:
    """Does the work of ``dybit rtl``: writes the Verilog and returns a sentence that says what was written.

    Args:
        output: Path of the Verilog file.
        rows: Rows of the array, in place of the config's.
        columns: Columns of the array, in place of the config's.
        config: Path of a TOML file; the defaults if None.

    Raises:
        DyBitError: The parameters are wrong or a file cannot be read or written.
        MissingExtraError: Amaranth is not installed.
    """
    from dybit.accelerator.config import Config
    from dybit.rtl import verilog

    machine = Config() if config is None else Config.load(config)
    machine = replace(
        machine,
        rows=machine.rows if rows is None else rows,
        columns=machine.columns if columns is None else columns,
    )
    text = verilog(machine)
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DyBitError(f"output must be a file that can be written, not {str(output)!r}: {error}") from error
    return f"{output}: {machine.rows} x {machine.columns} array, {text.count(chr(10)):,} lines of Verilog"
