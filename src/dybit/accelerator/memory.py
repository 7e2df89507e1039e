"""Memory: what a layer moves between DRAM and the on-chip memories, for the cheapest order of its loops.

It is a model: the hardware in dybit.rtl has no DRAM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dybit.accelerator.config import Config
from dybit.accelerator.datapath import Mode
from dybit.accelerator.mapping import Mapping, compute_cycles, row_tiles
from dybit.workloads.workload import Layer


@dataclass(frozen=True)
class Traffic:
    """Bytes between DRAM and the chip, and the loops that cause them.

    Attributes:
        weights: Bytes of weights read (the second operand of an attention product).
        inputs: Bytes of activations read, halos included.
        outputs: Bytes of activations written.
        tiles: Pieces into which the rows are cut.
        order: Outer loop: ``"n"`` keeps the weights of some output channels, ``"m"`` some rows of the input.
        prologue: Bytes of the first tiles, which nothing can overlap.
    """

    weights: int
    inputs: int
    outputs: int
    tiles: int
    order: str
    prologue: int

    @property
    def total(self) -> int:
        """Bytes of all operands."""
        return self.weights + self.inputs + self.outputs


def _orders(
    layer: Layer, mapping: Mapping, mode: Mode, config: Config, bits: tuple[int, int], tiles: int
) -> list[Traffic]:
    """The traffic of both loop orders with the rows cut into ``tiles``.

    An operand is fetched once where the part of it that the inner loops reuse fits half its memory (the other half
    is being filled), and otherwise once for every turn of the loop outside. On chip a code takes its container.
    """
    weight_bits, activation_bits = bits
    tile_k, tile_n = config.tile(mode)
    stored = layer.weight_elements * mode.weight_bits / 8 / mapping.passes
    slab = layer.k * min(tile_n, layer.n * mapping.packed) * mode.weight_bits / 8
    elements = layer.input_elements + layer.halo_elements(tiles)
    resident = elements * mode.activation_bits / 8 / mapping.passes
    weights = math.ceil(layer.weight_elements * weight_bits / 8)
    inputs = math.ceil(elements * activation_bits / 8)
    outputs = math.ceil(layer.output_elements * activation_bits / 8)
    first = min(tile_k, layer.k) * min(tile_n, layer.n) * weight_bits
    first += row_tiles(layer.m, tiles)[0] * min(tile_k, layer.k) * activation_bits
    half_weights, half_inputs = config.weight_sram / 2, config.activation_sram / 2

    n_weights = weights * (1 if slab <= half_weights else tiles)
    n_inputs = inputs * (1 if resident <= half_inputs else mapping.n_folds)
    m_weights = weights * (1 if tiles == 1 or stored <= half_weights else tiles)
    m_inputs = inputs * (1 if resident / tiles <= half_inputs else mapping.n_folds)
    prologue = math.ceil(first / 8)
    return [
        Traffic(n_weights, n_inputs, outputs, tiles, "n", prologue),
        Traffic(m_weights, m_inputs, outputs, tiles, "m", prologue),
    ]


def cheapest(
    layer: Layer, mapping: Mapping, mode: Mode, config: Config, bits: tuple[int, int]
) -> tuple[Traffic, int, int]:
    """Returns the traffic, compute cycles and memory cycles of the fastest tiling.

    Tried are tiles of all rows, if their partial sums fit, and of every power of two that fits, down to the rows of
    the array: shorter ones would make the array wait for weights.

    Args:
        layer: The layer.
        mapping: The layer on the array.
        mode: The width pair on the array.
        config: The accelerator.
        bits: Width of the weight and activation codes in DRAM, before they are put into containers.
    """
    best: tuple[int, int, Traffic, int, int] | None = None
    for tiles in _tilings(layer.m, config):
        compute = compute_cycles(mapping, mode, config, tiles)
        for traffic in _orders(layer, mapping, mode, config, bits, tiles):
            memory = math.ceil(traffic.total / config.dram_bytes_per_cycle)
            cycles = max(compute, memory) + math.ceil(traffic.prologue / config.dram_bytes_per_cycle)
            if best is None or (cycles, traffic.total) < best[:2]:
                best = (cycles, traffic.total, traffic, compute, memory)
    assert best is not None  # there is always a tiling: the partial sums of one row fit, as the config checks
    return best[2:]


def _tilings(rows: int, config: Config) -> set[int]:
    """Numbers of row tiles worth trying."""
    tilings = {1} if rows <= config.sum_rows else set()
    size = 1 << (config.sum_rows.bit_length() - 1)
    while size >= config.rows or not tilings:
        tilings.add(math.ceil(rows / size))
        size //= 2
    return tilings
