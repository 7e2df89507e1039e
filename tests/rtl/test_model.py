from fractions import Fraction

import numpy as np
import pytest

from dybit.accelerator.datapath import CONTAINERS
from dybit.formats.format import Format, variants
from dybit.rtl.model import Requantizer, encode, scaled, widen


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_code_in_a_wider_container_keeps_its_value(bits):
    for fmt in (f for sign in (False, True) for f in variants(bits, sign)):
        for container in (c for c in CONTAINERS if c >= bits):
            codes, variant = widen(fmt, container)
            # the container's own format, read with the variant that the decoder is told
            wide = Format(container, variant.signed, variant.max_run, variant.midrise, variant.spare)
            unit = wide.values[codes] * 2.0 ** (container - 1)
            assert np.array_equal(unit, scaled(fmt, container)), (fmt, container)
            assert np.array_equal(wide.values[codes], fmt.values)


def test_two_bits_with_a_spare_level_become_codes_without():
    # Shifted up, 10 would be read as 5/2.
    codes, variant = widen(Format(2, spare=True), 4)
    assert [f"{code:04b}" for code in codes] == ["0000", "0100", "0110", "1100"]
    assert (variant.signed, variant.max_run, variant.midrise, variant.spare) == (True, 2, False, False)
    codes, variant = widen(Format(2, spare=True), 2)
    assert codes.tolist() == [0, 1, 2, 3] and variant.spare


def test_requantizer_is_exact_for_short_ratios_and_close_for_others():
    for ratio in (Fraction(3, 8), Fraction(-5, 4096), Fraction(12345, 1 << 20), 1, 0):
        parameters = Requantizer.of(ratio)
        assert Fraction(parameters.multiplier, 1 << parameters.shift) == ratio * 256
    parameters = Requantizer.of(0.1)
    assert parameters.multiplier / 2**parameters.shift / 256 == pytest.approx(0.1, rel=2**-14)
    sums = np.arange(-300, 300)
    fmt = Format(6, True, 2)
    assert np.array_equal(encode(sums, Requantizer.of(1 / 64), fmt), fmt.encode(sums / 64))
    assert np.array_equal(encode(sums, Requantizer.of(1 / 64), fmt, relu=True), fmt.encode(np.maximum(sums, 0) / 64))
