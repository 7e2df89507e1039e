"""The simulator's results as rows, CSV and sentences.

A model that is not built in comes as a workload.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dybit.accelerator.simulate import Bits, Cost, LayerCost
from dybit.errors import DyBitError

if TYPE_CHECKING:
    pass

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
