"""DRAM traffic against fetches counted loop by loop."""

import math

import pytest

from dybit.accelerator.config import Config
from dybit.accelerator.datapath import mode
from dybit.accelerator.mapping import map_layer
from dybit.accelerator.memory import cheapest
from dybit.workloads.workload import Gemm

ROOMY = Config(rows=4, columns=4, activation_sram=1 << 20, weight_sram=1 << 20, sum_sram=1 << 20)


def traffic(layer, config, bits=(8, 8)):
    fused = mode(*bits, config.narrowest)
    return cheapest(layer, map_layer(layer, fused, config), fused, config, bits)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4), (2, 4)])
def test_large_memories_fetch_everything_once(bits):
    layer = Gemm("g", 64, 48, 32)
    found, _, memory = traffic(layer, ROOMY, bits)
    assert (found.weights, found.inputs, found.outputs) == (
        48 * 32 * bits[0] // 8, 64 * 48 * bits[1] // 8, 64 * 32 * bits[1] // 8,
    )  # fmt: skip
    assert memory == math.ceil(found.total / ROOMY.dram_bytes_per_cycle)


def test_small_memories_fetch_again_and_never_less_than_once():
    layer = Gemm("g", 512, 256, 256)
    once, _, _ = traffic(layer, ROOMY)
    small = Config(rows=4, columns=4, activation_sram=2048, weight_sram=2048, sum_sram=2048)
    again, _, _ = traffic(layer, small)
    assert again.tiles > 1 and again.total > once.total
    assert again.outputs == once.outputs == 512 * 256
    assert again.weights % once.weights == 0 and again.inputs % once.inputs == 0
