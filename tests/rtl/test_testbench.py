"""The words that the testbench writes hold every code and every parameter of a program."""

import numpy as np

from dybit.accelerator import Config
from dybit.formats.format import Format, variants
from dybit.rtl.accelerator import Accelerator
from dybit.rtl.program import random_program
from dybit.rtl.testbench import Testbench, memory_words

CONFIG = Config(rows=2, columns=2, activation_sram=4096, weight_sram=4096, sum_sram=4096)
UNSIGNED = Format(4, signed=False)


def program(seed=0):
    return random_program(CONFIG, (1, 3, 5, 4), (UNSIGNED, variants(4), UNSIGNED), seed)


def test_no_address_is_written_twice_and_every_bank_is_full():
    words = memory_words(program())
    places = [word[:3] for word in words]
    assert len(set(places)) == len(places)
    for target, banks in (("activations", program().activation_banks()), ("weights", program().weight_banks())):
        written = {(bank, at): data for name, bank, at, data in words if name == target}
        assert written == {(b, at): int(word) for b, bank in enumerate(banks) for at, word in enumerate(bank)}


def test_programs_run_one_after_another():
    first, second = program(0), program(1)
    runs = Testbench(Accelerator(CONFIG)).run([first, second, first])
    assert np.array_equal(runs[0].outputs, first.outputs)
    assert np.array_equal(runs[1].outputs, second.outputs)
    assert np.array_equal(runs[2].outputs, runs[0].outputs) and runs[2].cycles == runs[0].cycles
