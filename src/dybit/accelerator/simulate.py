"""Simulation: workload, bits and config in, cycles, traffic and energy out; per layer and in total.

Pure functions; the cost of a layer is cached, so that a search can ask often.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from dybit.accelerator.config import Config
from dybit.accelerator.datapath import FIELD_BITS, mode
from dybit.accelerator.mapping import compute_cycles, map_layer
from dybit.accelerator.memory import Traffic, cheapest
from dybit.errors import DyBitError, check_keys
from dybit.workloads.workload import Layer, Workload

Bits = tuple[int, int]
DEFAULT = "*"


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer.

    Attributes:
        layer: The layer.
        bits: Width of its weight and activation codes; the same for both operands of an attention product.
        folds: Loads of weights into the array.
        compute_cycles: Cycles of the array.
        memory_cycles: Cycles in which DRAM is busy.
        prologue_cycles: Cycles of the first tiles, before anything can overlap.
        cycles: Cycles of the layer.
        traffic: Bytes by operand.
        utilization: Multiply-accumulates done, divided by those that the array could have done in ``cycles``.
        counts: How often each energy event happens, as pairs.
    """

    layer: Layer
    bits: Bits
    folds: int
    compute_cycles: int
    memory_cycles: int
    prologue_cycles: int
    cycles: int
    traffic: Traffic
    utilization: float
    counts: tuple[tuple[str, int], ...]

    @property
    def stall_cycles(self) -> int:
        """Cycles in which the array waits for DRAM, the prologue not included."""
        return max(self.memory_cycles - self.compute_cycles, 0)

    @property
    def bound(self) -> str:
        """``"memory"`` where DRAM takes longer than the array, else ``"compute"``."""
        return "memory" if self.memory_cycles > self.compute_cycles else "compute"


@dataclass(frozen=True)
class Cost:
    """The cost of a network, whose layers run one after another.

    Attributes:
        workload: The network.
        config: The accelerator.
        layers: Costs of the layers, in order.
    """

    workload: Workload
    config: Config
    layers: tuple[LayerCost, ...]

    @property
    def cycles(self) -> int:
        """Cycles of all layers."""
        return sum(cost.cycles for cost in self.layers)

    @property
    def seconds(self) -> float:
        """Time of one run."""
        return self.cycles / self.config.frequency

    @property
    def traffic(self) -> int:
        """Bytes between DRAM and the chip."""
        return sum(cost.traffic.total for cost in self.layers)

    @property
    def memory_bound(self) -> float:
        """Share of the cycles that are in memory-bound layers."""
        return sum(cost.cycles for cost in self.layers if cost.bound == "memory") / self.cycles

    @property
    def joules(self) -> float | None:
        """Energy by the config's table, or None where it has none.

        Raises:
            DyBitError: The table has no cost for an event that happens.
        """
        if self.config.energy is None:
            return None
        return sum(self.config.energy.total(dict(cost.counts)) for cost in self.layers)


def simulate(workload: Workload, bits: Bits | Mapping[str, Bits], config: Config | None = None) -> Cost:
    """Returns what ``workload`` costs on the accelerator.

    Args:
        workload: The network.
        bits: Width of the weight and activation codes: one pair for all layers, or a pair for each layer name, where
            ``"*"`` stands for those not named.
        config: The accelerator; its defaults if None.

    Raises:
        DyBitError: A layer has no bits, a name is unknown, or a width is not 2 to 8.

    Example:
        >>> from dybit.workloads.networks import network
        >>> resnet = network("resnet18")
        >>> round(simulate(resnet, (8, 8)).cycles / simulate(resnet, (2, 2)).cycles)
        8
    """
    config = config or Config()
    table = _per_layer(workload, bits)
    return Cost(workload, config, tuple(layer_cost(layer, table[layer.name], config) for layer in workload))


def _per_layer(workload: Workload, bits: Bits | Mapping[str, Bits]) -> dict[str, Bits]:
    """The bits of every layer by name."""
    names = [layer.name for layer in workload]
    given = dict(bits) if isinstance(bits, Mapping) else {DEFAULT: bits}
    check_keys("bits", given, [*names, DEFAULT])
    for name, pair in given.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise DyBitError(f"bits of {name!r} must be a pair (weight bits, activation bits), not {pair!r}")
    missing = [name for name in names if name not in given and DEFAULT not in given]
    if missing:
        raise DyBitError(f"bits must name every layer or have {DEFAULT!r}, layer {missing[0]!r} has none")
    return {name: given.get(name, given.get(DEFAULT, (0, 0))) for name in names}


def layer_cost(layer: Layer, bits: Bits, config: Config) -> LayerCost:
    """Returns what one layer costs; the same question asked again is answered from a cache.

    Raises:
        DyBitError: A width is not 2 to 8, or the layer sums more products than ``config.reduction``.
    """
    if layer.dynamic:
        bits = (bits[1], bits[1])  # both operands are activations
    return _cached(layer, bits, config)


@lru_cache(maxsize=1 << 16)
def _cached(layer: Layer, bits: Bits, config: Config) -> LayerCost:
    fused = mode(*bits, config.narrowest)
    if layer.k > config.reduction:
        raise DyBitError(
            f"reduction must be at least the {layer.k} products that layer {layer.name!r} sums, not {config.reduction}"
        )
    mapping = map_layer(layer, fused, config)
    if config.schedule == "scalesim":
        # Stall-free by definition; the traffic is still that of our own memory model.
        traffic, _, memory = cheapest(layer, mapping, fused, replace(config, schedule="jit"), bits)
        compute, prologue = compute_cycles(mapping, fused, config), 0
        cycles = compute
    else:
        traffic, compute, memory = cheapest(layer, mapping, fused, config, bits)
        prologue = math.ceil(traffic.prologue / config.dram_bytes_per_cycle)
        cycles = max(compute, memory) + prologue
    rows, columns, m = config.rows, config.columns, mapping.m
    folds = mapping.folds * (1 if config.schedule == "scalesim" else traffic.tiles)
    counts = {
        f"mac_w{fused.weight_bits}a{fused.activation_bits}": layer.macs,
        # filled from DRAM once per byte of traffic, read by every row and fold
        "activation_sram_bit": 8 * traffic.inputs + mapping.folds * m * rows * FIELD_BITS,
        "weight_sram_bit": 8 * traffic.weights + folds * rows * columns * fused.weight_word,
        # written by every fold, read by every fold but the first along K
        "sum_sram_bit": mapping.passes * mapping.n_folds * (2 * mapping.k_folds - 1) * m * columns * config.sum_word,
        "dram_bit": 8 * traffic.total,
    }
    peak = cycles * rows * columns * fused.macs
    return LayerCost(
        layer, bits, folds, compute, memory, prologue, cycles, traffic, layer.macs / peak, tuple(counts.items())
    )
