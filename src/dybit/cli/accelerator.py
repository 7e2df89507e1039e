"""``dybit simulate`` and ``dybit rtl``: the accelerator's cycles and its Verilog.

Must not know how either is made; torch is loaded only to trace a model that is not built in.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dybit.cli.console import guarded, out
from dybit.errors import DyBitError

if TYPE_CHECKING:
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
        typer.Option(metavar="DATA", help="module:function whose first batch is run to trace a torch model."),
    ] = None,
) -> None:
    """Count a network's cycles and DRAM traffic on the accelerator, layer by layer, and its speedup over 8/8 bits.

    Example: dybit simulate resnet50 --weights 4 --activations 4
    """
    from dybit.accelerator.report import simulate_command

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
    """Write the accelerator as synthesizable Verilog (needs the extra dybit[rtl]).

    Example: dybit rtl --rows 16 --cols 16 -o accelerator.v
    """
    from dybit.rtl import rtl_command

    out().print(rtl_command(output, rows, cols, config), soft_wrap=True)


def _workload(model: str, data: str | None) -> str | Workload:
    """The word itself where it names a workload; else a torch model, traced on the first batch of the data."""
    from dybit.cli.sources import is_reference, load_batches, load_model

    if not is_reference(model):
        if data is not None:
            raise DyBitError(f"--data {data!r} is for a torch model, and MODEL {model!r} is not module:function")
        return model
    if data is None:
        raise DyBitError(f"MODEL {model!r} is a torch model: --data module:function must give a batch to trace it with")
    from dybit.measure.trace import trace
    from dybit.models.running import run_batch

    network = load_model(model)
    batch = load_batches(data, "--data", split="evaluation", limit=1)[0]
    run_batch(network, batch, "the first batch of --data")  # says what is wrong in one sentence
    named = batch if isinstance(batch, dict) else {}
    inputs = () if named else batch if isinstance(batch, tuple | list) else (batch,)
    return trace(network, *inputs, name=model, **named)
