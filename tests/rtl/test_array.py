from itertools import count

import pytest
from rtl_accelerator_cases import MEMORIES, UNSIGNED, check

from dybit.accelerator import Config
from dybit.accelerator.datapath import modes
from dybit.formats.format import variants
from dybit.rtl.program import random_program


def every_mode(config, rows, k_folds, n_folds):
    """A layer in every mode, with K and N that fill no tile, all variants among its output channels."""
    number = count()
    for mode in modes(config.narrowest):
        tile_k, tile_n = config.tile(mode)
        shape = (1, rows, (k_folds - 1) * tile_k + 1, max(n_folds * tile_n - 1, 1))
        weights = variants(mode.weight_bits, True)
        yield random_program(
            config, shape, (UNSIGNED[mode.activation_bits], weights, UNSIGNED[mode.activation_bits]), next(number)
        )


@pytest.mark.parametrize(
    ("rows", "columns", "narrowest", "inputs"), [(2, 3, 2, 5), (2, 3, 4, 1), (4, 4, 2, 7), (4, 4, 4, 3), (1, 1, 2, 2)]
)
def test_arrays_in_every_mode(rows, columns, narrowest, inputs):
    config = Config(rows=rows, columns=columns, narrowest=narrowest, **MEMORIES)
    check(config, list(every_mode(config, inputs, 3, 2)))


def test_an_array_of_8_by_8_in_every_mode():
    config = Config(rows=8, columns=8, activation_sram=4096, weight_sram=16384, sum_sram=8192)
    check(config, list(every_mode(config, 4, 2, 1)))
