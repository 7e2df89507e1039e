"""The simulator against SCALE-Sim, against an independent model of the same architecture, and against common sense."""

import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dybit.accelerator import Config, simulate
from dybit.accelerator.datapath import PIPE, mode
from dybit.accelerator.mapping import compute_cycles, map_layer
from dybit.accelerator.simulate import _cached, layer_cost
from dybit.errors import DyBitError
from dybit.workloads.networks import network
from dybit.workloads.workload import Gemm, Workload

PAIRS = [(8, 8), (4, 8), (4, 4), (2, 4), (2, 2)]


def reference_rows():
    lines = (Path(__file__).parents[1] / "data" / "scalesim_resnet50.csv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


class TestScaleSim:
    @pytest.mark.parametrize("row", reference_rows(), ids=lambda row: row["layer"])
    def test_every_shape_takes_the_cycles_that_scalesim_counts(self, row):
        layer = Gemm(row["layer"], int(row["M"]), int(row["K"]), int(row["N"]))
        cost = layer_cost(layer, (8, 8), Config(schedule="scalesim"))
        assert (cost.folds, cost.cycles) == (int(row["folds"]), int(row["total_cycles"]))

    def test_the_network_takes_as_many_in_total(self):
        assert simulate(network("resnet50"), (8, 8), Config(schedule="scalesim")).cycles == 6_349_206
        assert sum(int(row["count"]) * int(row["total_cycles"]) for row in reference_rows()) == 6_349_206


class TestSpeedup:
    # An independent model of this architecture; its cycles of 8/8, then its speedups at 4/8, 4/4, 2/4 and 2/2.
    @pytest.mark.parametrize(
        ("name", "base", "speedups"),
        [
            ("resnet50", 4.114e6, (1.94, 3.60, 5.68, 8.99)),
            ("resnet18", 1.804e6, (1.98, 3.59, 5.39, 8.29)),
            ("mobilenet_v2", 1.163e6, (1.09, 2.20, 2.35, 3.96)),
            ("vit_b_16", 18.222e6, (1.91, 3.72, 6.98, 13.36)),
        ],
    )
    def test_over_8_8_agrees_with_an_independent_model(self, name, base, speedups):
        cycles = [simulate(network(name), pair).cycles for pair in PAIRS]
        assert cycles[0] == pytest.approx(base, rel=0.02)
        assert [cycles[0] / other for other in cycles[1:]] == pytest.approx(speedups, rel=0.02)

    @pytest.mark.parametrize(
        ("name", "speedups"),
        [
            ("resnet50", (1.93, 3.42, 5.51, 7.00)),
            ("resnet18", (1.95, 3.41, 6.16, 8.20)),
            ("mobilenet_v2", (1.81, 2.89, 3.70, 4.56)),
            ("vit_b_16", (1.88, 3.62, 6.59, 10.57)),
        ],
    )
    def test_lanes_summed_together_agree_too(self, name, speedups):
        cycles = [simulate(network(name), pair, Config(fuse="together")).cycles for pair in PAIRS]
        assert [cycles[0] / other for other in cycles[1:]] == pytest.approx(speedups, rel=0.02)

    def test_first_and_last_layer_kept_at_8_bits(self):
        workload = network("resnet18")
        mixed = {"*": (2, 2), "conv1": (8, 8), "fc": (8, 8)}
        assert simulate(workload, (8, 8)).cycles / simulate(workload, mixed).cycles == pytest.approx(5.46, rel=0.02)


def gemms():
    size = st.integers(1, 700)
    return st.builds(Gemm, st.just("g"), size, size, size, st.integers(1, 5), dynamic=st.booleans())


small_configs = st.builds(
    Config,
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dram_bytes_per_cycle=st.sampled_from([1, 7.5, 64]),
    activation_sram=st.sampled_from([1 << 13, 1 << 18]),
    weight_sram=st.sampled_from([1 << 14, 1 << 18]),
    sum_sram=st.sampled_from([1 << 13, 1 << 18]),
    fuse=st.sampled_from(["split", "together"]),
    narrowest=st.sampled_from([2, 4, 8]),
)


class TestProperties:
    @settings(max_examples=150, deadline=None)
    @given(gemms(), small_configs, st.sampled_from([*PAIRS, (3, 5), (8, 2)]))
    def test_costs_are_bounded_by_what_must_happen(self, layer, config, bits):
        cost = layer_cost(layer, bits, config)
        width = bits[1] if layer.dynamic else bits[0]
        assert cost.traffic.weights >= layer.weight_elements * width / 8
        assert cost.traffic.inputs >= layer.input_elements * bits[1] / 8
        assert cost.cycles >= max(cost.compute_cycles, cost.traffic.total / config.dram_bytes_per_cycle)
        assert 0 < cost.utilization <= 1
        assert cost.bound == ("memory" if cost.stall_cycles else "compute")

    @settings(max_examples=100, deadline=None)
    @given(gemms(), small_configs)
    def test_more_never_costs_time(self, layer, config):
        cycles = layer_cost(layer, (4, 4), config).cycles
        assert layer_cost(layer, (4, 4), replace(config, dram_bytes_per_cycle=1000)).cycles <= cycles
        assert layer_cost(layer, (4, 4), replace(config, weight_sram=4 * config.weight_sram)).cycles <= cycles
        assert layer_cost(layer, (4, 4), replace(config, weight_port=8)).cycles >= cycles

    @settings(max_examples=100, deadline=None)
    @given(gemms(), st.integers(1, 40), st.integers(1, 40))
    def test_the_array_formula_is_the_one_of_the_documentation(self, layer, rows, columns):
        config = Config(rows=rows, columns=columns)
        fused = mode(4, 4)
        mapping = map_layer(layer, fused, config)
        folds = layer.groups if layer.dynamic else -(-layer.groups // mapping.packed)
        folds *= -(-layer.k // (2 * rows)) * -(-layer.n // (2 * columns))
        expected = (folds - 1) * max(layer.m, rows) + layer.m + rows + columns + PIPE
        assert compute_cycles(mapping, fused, config) == expected
        # pieces of the rows that are longer than the array is tall cost nothing
        if layer.m % 2 == 0 and layer.m // 2 >= rows:
            assert compute_cycles(mapping, fused, config, 2) == expected

    def test_fewer_bits_are_never_slower_on_real_networks(self):
        for name in ("resnet50", "mobilenet_v2", "swin_t", "convnext_tiny", "regnet_y_1_6gf"):
            cycles = [simulate(network(name), pair).cycles for pair in PAIRS]
            assert cycles == sorted(cycles, reverse=True), name


class TestBits:
    WORK = Workload("w", (Gemm("first", 8, 32, 32), Gemm("second", 8, 32, 32)))

    def test_by_layer(self):
        cost = simulate(self.WORK, {"first": (8, 8), "*": (2, 4)})
        assert [layer.bits for layer in cost.layers] == [(8, 8), (2, 4)]
        assert cost.cycles == sum(layer.cycles for layer in cost.layers)
        assert cost.seconds == cost.cycles / 500e6

    @pytest.mark.parametrize(
        ("bits", "words"),
        [
            ({"first": (8, 8)}, r"must name every layer or have '\*', layer 'second' has none"),
            ({"frist": (8, 8), "*": (4, 4)}, "unknown name 'frist'; did you mean 'first'"),
            ({"*": 4}, "must be a pair .* not 4"),
            ((4, 4, 4), "must be a pair"),
            ((9, 8), "weight bits of the pair 9/8 must be an integer from 2 to 8, not 9"),
        ],
    )
    def test_errors(self, bits, words):
        with pytest.raises(DyBitError, match=words):
            simulate(self.WORK, bits)

    def test_a_sum_longer_than_the_partial_sums_are_exact_for(self):
        work = Workload("w", (Gemm("long", 1, 9000, 4),))
        with pytest.raises(DyBitError, match="at least the 9000 products that layer 'long' sums, not 8191"):
            simulate(work, (8, 8))
        assert simulate(work, (8, 8), Config(reduction=9000)).cycles > 0


def test_a_layer_takes_less_than_a_fifth_of_a_millisecond():
    workload = network("resnet50")
    simulate(workload, (4, 4))
    best = float("inf")
    for _attempt in range(5):
        _cached.cache_clear()
        start = time.process_time()
        simulate(workload, (4, 4))
        best = min(best, (time.process_time() - start) / len(workload))
    assert best < 0.2e-3


def test_no_torch_and_no_amaranth_are_imported():
    code = (
        "import sys, dybit.accelerator, dybit.workloads.networks\n"
        "print('torch' in sys.modules, 'amaranth' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
