import pytest

from dybit.accelerator import Config, EnergyTable, simulate
from dybit.accelerator.simulate import layer_cost
from dybit.errors import DyBitError
from dybit.workloads.workload import Gemm, Workload


class TestEnergy:
    TABLE = EnergyTable.of(
        {"mac_w8a8": 2.0, "activation_sram_bit": 0, "weight_sram_bit": 0, "sum_sram_bit": 0, "dram_bit": 10.0}
    )

    def test_is_the_sum_over_events(self):
        work = Workload("w", (Gemm("g", 8, 32, 32),))
        cost = simulate(work, (8, 8), Config(energy=self.TABLE))
        assert cost.joules == 2.0 * 8 * 32 * 32 + 10.0 * 8 * cost.traffic
        assert simulate(work, (8, 8)).joules is None

    def test_memory_events_count_every_fold(self):
        counts = dict(layer_cost(Gemm("g", 10, 64, 64), (8, 8), Config(rows=32, columns=32)).counts)
        assert counts["activation_sram_bit"] == 8 * 10 * 64 + 4 * 10 * 32 * 8
        assert counts["weight_sram_bit"] == 2 * 8 * 64 * 64
        assert counts["sum_sram_bit"] == 2 * (1 + 2) * 10 * 32 * Config().sum_word

    def test_a_missing_cost_is_an_error(self):
        work = Workload("w", (Gemm("g", 8, 32, 32),))
        with pytest.raises(DyBitError, match="no cost for 'mac_w4a4', which happens 8192 times"):
            _ = simulate(work, (4, 4), Config(energy=self.TABLE)).joules
        with pytest.raises(DyBitError, match="unknown name 'mac_w4a2'; did you mean"):
            EnergyTable.of({"mac_w4a2": 1.0})
        with pytest.raises(DyBitError, match=r"energy of dram_bit must be .* not -1"):
            EnergyTable.of({"dram_bit": -1})
