"""Shared by the tests of several modules."""

import numpy as np

from dybit.formats.format import Format
from dybit.rtl.accelerator import Accelerator
from dybit.rtl.testbench import Testbench

MEMORIES = {"activation_sram": 4096, "weight_sram": 8192, "sum_sram": 4096}


UNSIGNED = {bits: Format(bits, signed=False) for bits in range(2, 9)}


def check(config, programs):
    """Runs programs one after another on one array and compares all that comes out."""
    assert programs
    for program, run in zip(programs, Testbench(Accelerator(config)).run(programs), strict=True):
        assert np.array_equal(run.outputs, program.outputs), program.mode
        assert run.cycles == run.last == program.cycles
        assert len(np.unique(program.outputs)) > 1
