import numpy as np
import pytest
from rtl_accelerator_cases import MEMORIES, UNSIGNED

from dybit.accelerator import Config
from dybit.accelerator.datapath import datapath_factor, largest_integer, modes
from dybit.formats.format import Format, variants
from dybit.rtl.accelerator import Accelerator
from dybit.rtl.model import Requantizer
from dybit.rtl.program import Program
from dybit.rtl.testbench import Testbench


@pytest.mark.parametrize("mode", modes(), ids=lambda mode: f"w{mode.weight_bits}a{mode.activation_bits}")
def test_partial_sums_are_exact_in_the_worst_case(mode):
    config = Config(rows=2, columns=1, reduction=2 * mode.activations * 3, **MEMORIES)
    k, n = config.reduction, mode.lanes
    x = np.full((1, 2, k), (1 << mode.activation_bits) - 1)
    output = Format(8, True, 3)
    tops = []
    for sign in (1, -1):  # the spare level of 2 bits has no mirror image

        def top(fmt, sign=sign):
            return int((fmt.significands * sign).max()) * datapath_factor(True, fmt.midrise)

        fmt = max(variants(mode.weight_bits, True), key=top)
        tops.append(top(fmt))
        w = np.full((1, k, n), int(np.argmax(fmt.significands * sign)))
        operands = (config, x, UNSIGNED[mode.activation_bits], w, (fmt,) * n)
        largest = abs(int(Program(*operands, (Requantizer(0, 1, 0),) * n, output).sums[0, 0, 0]))
        assert largest == largest_integer(mode.activation_bits, False) * tops[-1] * k
        program = Program(*operands, (Requantizer.of(6 / largest),) * n, output)
        assert np.all(output.values[program.outputs] == 6 * sign)  # one bit less and the sign would be wrong
        assert np.array_equal(Testbench(Accelerator(config)).run([program])[0].outputs, program.outputs)
    assert max(tops) == largest_integer(mode.weight_bits, True)
