"""Speedups of the built-in networks over 8/8 on the same array, as Markdown. Usage: python hardware/speedups.py."""

from __future__ import annotations

from collections.abc import Mapping

from dybit.accelerator import Config, simulate
from dybit.workloads.networks import NETWORKS, network
from dybit.workloads.workload import Workload

PAIRS = ((4, 8), (4, 4), (2, 4), (2, 2))


def ends_at_8(workload: Workload, bits: tuple[int, int]) -> Mapping[str, tuple[int, int]]:
    """Returns bits for all layers but the first and the last, which stay at 8/8."""
    return {"*": bits, workload.layers[0].name: (8, 8), workload.layers[-1].name: (8, 8)}


def speedup_row(workload: Workload, config: Config, ends: bool = False) -> str:
    """Returns the speedups of a network as cells of a table."""
    base = simulate(workload, (8, 8), config)
    cells = []
    for bits in PAIRS:
        cost = simulate(workload, ends_at_8(workload, bits) if ends else bits, config)
        cells.append(f"{base.cycles / cost.cycles:.2f} ({cost.memory_bound:.0%})")
    return f"{base.cycles / 1e6:.3f} M | {' | '.join(cells)}"


def main() -> None:
    """Prints a table for the defaults, and one for each change to them."""
    head = f"cycles at 8/8 | {' | '.join(f'{w}/{a}' for w, a in PAIRS)}"
    changes = {
        "32 × 32, 3 × 256 KiB, 32 bytes per cycle": (Config(), False),
        "the same, first and last layer kept at 8/8": (Config(), True),
        "the same, 64 bytes per cycle": (Config(dram_bytes_per_cycle=64), False),
        "the same, lanes summed together": (Config(fuse="together"), False),
    }
    for what, (config, ends) in changes.items():
        print(f"| {what} | {head} |")
        print("|---|---|" + "---|" * len(PAIRS))
        for name in NETWORKS:
            print(f"| {name} | {speedup_row(network(name), config, ends)} |")
        print()


if __name__ == "__main__":
    main()
