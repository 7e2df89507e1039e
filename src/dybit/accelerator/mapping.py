"""Mapping: how a layer is cut into folds of the array, and how many cycles the array needs for them.

The cycle count is that of the hardware in dybit.rtl, cycle for cycle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dybit.accelerator.config import Config
from dybit.accelerator.datapath import PIPE, Mode
from dybit.workloads.workload import Layer


@dataclass(frozen=True)
class Mapping:
    """A layer on the array.

    A fold is one load of weights, through which all rows of the input are streamed. Groups run one after another,
    or several at once where their blocks fit on the diagonal of the array.

    Attributes:
        m: Rows of the input.
        passes: Runs through the groups: the groups, divided by those that share the array.
        k_folds: Folds along K in a pass.
        n_folds: Folds along N in a pass.
        packed: Groups that share the array.
    """

    m: int
    passes: int
    k_folds: int
    n_folds: int
    packed: int

    @property
    def folds(self) -> int:
        """Loads of weights, the rows not cut into tiles."""
        return self.passes * self.k_folds * self.n_folds


def map_layer(layer: Layer, mode: Mode, config: Config) -> Mapping:
    """Returns how ``layer`` lies on the array in ``mode``."""
    tile_k, tile_n = config.tile(mode)
    packed = 1
    # The blocks beside the diagonal must be zero weights, which an attention product's operand cannot be given.
    if config.pack_depthwise and layer.groups > 1 and not layer.dynamic:
        packed = max(min(tile_k // layer.k, tile_n // layer.n, layer.groups), 1)
    passes = math.ceil(layer.groups / packed)
    return Mapping(layer.m, passes, math.ceil(layer.k / tile_k), math.ceil(layer.n / tile_n), packed)


def row_tiles(rows: int, tiles: int) -> tuple[int, int]:
    """Returns the rows of all tiles but the last, and those of the last, when ``rows`` are cut into ``tiles``."""
    size = math.ceil(rows / tiles)
    return size, rows - size * (math.ceil(rows / size) - 1)


def weight_cycles(mode: Mode, config: Config) -> int:
    """Returns the cycles in which the weights of one fold enter: one a row where the port is wide enough."""
    return config.rows * math.ceil(mode.weight_word / config.weight_port)


def compute_cycles(mapping: Mapping, mode: Mode, config: Config, tiles: int = 1) -> int:
    """Returns the cycles of the array for a layer, from the start to the last encoded output.

    Every fold but the last takes as long as its rows or its weights take to enter, whichever is longer; the last one
    drains through R rows, C columns and the pipeline. With the rows uncut this is
    ``(folds - 1)·max(M, Lw) + M + R + C + PIPE``.

    Args:
        mapping: The layer on the array.
        mode: The width pair.
        config: The accelerator.
        tiles: Pieces into which the rows are cut because the partial sums of all would not fit.
    """
    if config.schedule == "scalesim":
        # SCALE-Sim fills and drains in every fold, and counts cycles from zero.
        return mapping.folds * (mapping.m + 2 * config.rows + config.columns - 2) - 1
    enter = weight_cycles(mode, config)
    size, last = row_tiles(mapping.m, tiles)
    whole = math.ceil(mapping.m / size) - 1
    streaming = mapping.folds * (whole * max(size, enter) + max(last, enter))
    return streaming - max(last, enter) + last + config.rows + config.columns + PIPE
