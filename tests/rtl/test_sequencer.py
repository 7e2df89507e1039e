from rtl_accelerator_cases import MEMORIES, UNSIGNED, check

from dybit.accelerator import Config
from dybit.formats.format import variants
from dybit.rtl.program import random_program


def test_tiles_of_rows_and_passes():
    config = Config(rows=2, columns=2, **MEMORIES)
    formats = (UNSIGNED[4], variants(4), UNSIGNED[4])
    check(
        config,
        [
            random_program(config, (1, 7, 9, 5), formats, 1, tile=3),
            random_program(config, (1, 8, 4, 4), formats, 2, tile=1),
            random_program(config, (3, 3, 5, 3), formats, 3),
            random_program(config, (2, 5, 5, 9), formats, 4, tile=2),
        ],
    )
