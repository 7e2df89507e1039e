"""What the command line prints and writes."""

import csv

import pytest
from rich.console import Console

from dybit.accelerator import Config, EnergyTable, simulate
from dybit.accelerator.energy import EVENTS
from dybit.accelerator.report import find_workload, simulate_command, summary, write_csv
from dybit.errors import DyBitError
from dybit.workloads.networks import network
from dybit.workloads.workload import Gemm, Workload


def test_the_table_and_the_totals(tmp_path):
    (tmp_path / "accel.toml").write_text("rows = 16\ncolumns = 16\n", encoding="utf-8")
    table, totals = simulate_command("resnet18", 2, 2, config=tmp_path / "accel.toml", csv=tmp_path / "out.csv")
    config = Config(rows=16, columns=16)
    cost, base = (simulate(network("resnet18"), bits, config) for bits in ((2, 2), (8, 8)))
    assert f"{cost.cycles:,} cycles" in totals
    assert f"speedup {base.cycles / cost.cycles:.2f} over 8/8 bits on the same array" in totals
    assert "first layer at 2/2, last at 2/2" in totals
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    assert "layer4.0.downsample" in captured.get() and "resnet18 on 16 x 16" in captured.get()
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["layer"] for row in rows] == [layer.name for layer in network("resnet18")]
    assert sum(int(row["cycles"]) for row in rows) == cost.cycles
    assert {row["bound"] for row in rows} == {"compute", "memory"}


def test_energy_is_told_where_a_table_is_given():
    energy = EnergyTable.of(dict.fromkeys(EVENTS, 1e-12))
    work = Workload("w", (Gemm("g", 8, 8, 8),))
    cost = simulate(work, (4, 4), Config(energy=energy))
    assert "mJ by the energy table" in summary(cost, cost)
    assert "mJ" not in summary(simulate(work, (4, 4)), cost)


def test_models_are_names_or_files(tmp_path):
    work = Workload("mine", (Gemm("g", 8, 8, 8),))
    work.save(tmp_path / "mine.json")
    assert find_workload(str(tmp_path / "mine.json")) == work
    with pytest.raises(DyBitError, match="not 'resnet5'; did you mean 'resnet50'"):
        find_workload("resnet5")
    with pytest.raises(DyBitError, match="readable text file"):
        find_workload(str(tmp_path / "none.json"))
    with pytest.raises(DyBitError, match="csv must be a file that can be written"):
        write_csv(simulate(work, (4, 4)), tmp_path)
