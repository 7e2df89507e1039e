"""Programs: integer model, layout of the memories, and errors for what the hardware cannot hold."""

from dataclasses import replace

import numpy as np
import pytest

from dybit.accelerator import Config
from dybit.errors import DyBitError
from dybit.formats.format import Format, variants
from dybit.rtl.model import Requantizer, widen
from dybit.rtl.program import random_program

CONFIG = Config(rows=2, columns=3, activation_sram=4096, weight_sram=8192, sum_sram=4096)
UNSIGNED = Format(4, signed=False)
PROGRAM = random_program(CONFIG, (2, 4, 9, 7), (UNSIGNED, variants(4), UNSIGNED), 0)


def test_banks_hold_every_code_once():
    fields = PROGRAM.activation_banks()
    assert fields.shape == (2, 2 * PROGRAM.k_folds * 4)
    # second pass, second fold along K, row 1 of the array, row 3 of the input
    field = fields[1, (1 * PROGRAM.k_folds + 1) * 4 + 3]
    assert [field & 15, field >> 4] == PROGRAM.activations[1, 3, 6:8].tolist()
    words = PROGRAM.weight_banks()
    assert words.shape == (3, PROGRAM.weight_words)
    # first pass, second fold along N, first along K, row 1, column 0: inputs 2 and 3 for channel 6, nothing beside
    word = int(words[0, (1 * PROGRAM.k_folds + 0) * 2 + 1])
    assert [word >> 4 * i & 15 for i in range(4)] == [PROGRAM.weights[0, 2, 6], 0, PROGRAM.weights[0, 3, 6], 0]
    assert PROGRAM.channels()[0][3] == [13, None]


def test_sums_are_products_of_values():
    unit = 2.0 ** -(4 - 1)
    for channel, fmt in enumerate(PROGRAM.weight_formats):
        turn, n = divmod(channel, PROGRAM.n)
        real = UNSIGNED.values[PROGRAM.activations[turn]] @ fmt.values[PROGRAM.weights[turn, :, n]]
        assert np.array_equal(real, PROGRAM.sums[turn, :, n] * unit * unit)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Requantizer.of(1e9), "ratio must be within reach of 16 bits shifted by 0 to 63, not 1000000000.0"),
        (lambda: Requantizer.of(1e-30), "ratio must be within reach"),
        (lambda: Requantizer(0, 40000, 0), "multiplier must be -32768 to 32767, not 40000"),
        (lambda: Requantizer(0, 1, 64), "shift must be 0 to 63, not 64"),
        (lambda: widen(Format(5), 4), "container must be at least the 5 bits of s5, not 4"),
        (lambda: replace(PROGRAM, weights=PROGRAM.weights[:1]), "operands must agree in passes and K"),
        (lambda: replace(PROGRAM, weights=PROGRAM.weights[0]), r"operands must be \(passes, M, K\)"),
        (lambda: replace(PROGRAM, weight_formats=PROGRAM.weight_formats[1:]), "one for each of 14 channels"),
        (lambda: replace(PROGRAM, weight_formats=(Format(4, False),) * 14), "weight_formats must be signed"),
        (lambda: replace(PROGRAM, activation_format=Format(4, midrise=True)), "must have a zero to pad with, s4mid"),
        (lambda: replace(PROGRAM, output_format=Format(4, spare=True)), "mid-tread without a spare level, not s4spare"),
        (lambda: replace(PROGRAM, activations=PROGRAM.activations + 16), "activations must be codes of 4 bits"),
        (lambda: replace(PROGRAM, tile=0), "tile must be 1 to the 80 rows of partial sums, not 0"),
        (lambda: replace(PROGRAM, config=replace(CONFIG, reduction=8)), "at least the 9 products"),
        (
            lambda: random_program(replace(CONFIG, weight_sram=64), (2, 4, 9, 7), (UNSIGNED, variants(4), UNSIGNED), 0),
            "weight_sram must hold the .* bytes of the layer, not 64",
        ),
    ],
)
def test_errors_name_the_argument_and_quote_the_value(make, words):
    with pytest.raises(DyBitError, match=words):
        make()
