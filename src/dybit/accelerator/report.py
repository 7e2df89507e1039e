"""What the simulator found, for people: a table on the terminal, CSV, and the functions behind the command line.

Must not know torch or Amaranth; a model that is not built in comes as a workload.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dybit.accelerator.config import Config
from dybit.accelerator.simulate import Bits, Cost, LayerCost, simulate
from dybit.errors import DyBitError
from dybit.workloads.networks import NETWORKS, network
from dybit.workloads.workload import Workload

if TYPE_CHECKING:
    from rich.table import Table

BASE: Bits = (8, 8)


def row(cost: LayerCost) -> dict[str, Any]:
    """Returns one layer's figures by column name; bytes, cycles and shares as plain numbers."""
    layer = cost.layer
    return {
        "layer": layer.name,
        "m": layer.m,
        "k": layer.k,
        "n": layer.n,
        "groups": layer.groups,
        "weight_bits": cost.bits[0],
        "activation_bits": cost.bits[1],
        "folds": cost.folds,
        "compute_cycles": cost.compute_cycles,
        "memory_cycles": cost.memory_cycles,
        "prologue_cycles": cost.prologue_cycles,
        "stall_cycles": cost.stall_cycles,
        "cycles": cost.cycles,
        "utilization": round(cost.utilization, 6),
        "bound": cost.bound,
        "weight_bytes": cost.traffic.weights,
        "input_bytes": cost.traffic.inputs,
        "output_bytes": cost.traffic.outputs,
    }


def write_csv(cost: Cost, path: str | Path) -> None:
    """Writes one line for every layer.

    Raises:
        DyBitError: The file cannot be written.
    """
    rows = [row(layer) for layer in cost.layers]
    try:
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise DyBitError(f"csv must be a file that can be written, not {str(path)!r}: {error}") from error


def summary(cost: Cost, base: Cost) -> str:
    """Returns the totals in one sentence each, with what the speedup is measured against."""
    config = cost.config
    ends = [f"{layer.bits[0]}/{layer.bits[1]}" for layer in (cost.layers[0], cost.layers[-1])]
    lines = [
        f"{cost.cycles:,} cycles, {cost.seconds * 1e3:.3f} ms at {config.frequency / 1e6:g} MHz; "
        f"{cost.memory_bound:.0%} of them in memory-bound layers; {cost.traffic / 1e6:.2f} MB of DRAM traffic",
        f"speedup {base.cycles / cost.cycles:.2f} over {BASE[0]}/{BASE[1]} bits on the same array "
        f"({base.cycles:,} cycles); first layer at {ends[0]}, last at {ends[1]}",
    ]
    if cost.joules is not None:
        lines.append(f"{cost.joules * 1e3:.3f} mJ by the energy table of the config")
    return "\n".join(lines)


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


def find_workload(model: str) -> Workload:
    """Returns the workload of a built-in network's name, or of a JSON file.

    Raises:
        DyBitError: ``model`` is neither; the message names the nearest network.
    """
    if model not in NETWORKS and (model.endswith(".json") or Path(model).is_file()):
        return Workload.load(model)
    return network(model)


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
    workload = find_workload(model) if isinstance(model, str) else model
    machine = Config() if config is None else Config.load(config)
    cost, base = (simulate(workload, bits, machine) for bits in ((weights, activations), BASE))
    if csv is not None:
        write_csv(cost, csv)
    return table(cost), summary(cost, base)
