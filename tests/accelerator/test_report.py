"""What the command line prints and writes."""

import pytest

from dybit.accelerator import Config, EnergyTable, simulate
from dybit.accelerator.energy import EVENTS
from dybit.accelerator.report import summary, write_csv
from dybit.errors import DyBitError
from dybit.workloads.networks import find_workload
from dybit.workloads.workload import Gemm, Workload


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
