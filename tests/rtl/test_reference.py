"""The elements of the area table multiply what their names say; an area of something else would mean nothing."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from dybit.accelerator.datapath import modes
from dybit.formats.format import Format, variants
from dybit.rtl.codec import MODE, mode_bits
from dybit.rtl.model import integers
from dybit.rtl.reference import FixedElement, FusedIntegerElement, elements


def run(element, words, mode=None):
    """Products of (activation word, weight word) pairs, each the first of a fold, added to no sum."""
    seen = []

    async def bench(ctx):
        if mode is not None:
            ctx.set(element.mode, MODE.const(mode_bits(mode)))
        ctx.set(element.first, 1)
        for cycle in range(len(words) + 3):
            if cycle < len(words):
                ctx.set(element.activation, words[cycle][0])
                ctx.set(element.weight, words[cycle][1])
            if cycle >= 3:
                seen.append(ctx.get(element.sums_out))
            await ctx.tick()

    simulator = Simulator(element)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return seen


def significand_word(integer, bits):
    """Significand, 3 bits of shift and sign of an integer that a code stands for."""
    size, shift = abs(integer), 0
    while size >= 1 << bits:
        size, shift = size >> 1, shift + 1
    assert size << shift == abs(integer)  # no bit was lost: the significand is long enough
    return size | shift << bits | (integer < 0) << (bits + 3)


def test_int8_and_plain_integers():
    rng = np.random.default_rng(0)
    pairs = rng.integers(-128, 128, (50, 2))
    assert run(FixedElement("int8", 4), [(a & 255, w & 255) for a, w in pairs.tolist()]) == [a * w for a, w in pairs]
    pairs = [(16384, 12288), (16384, -12288), (0, 5), (-77, 99)]
    words = [(a & 0xFFFF, w & 0x7FFF) for a, w in pairs]
    assert run(FixedElement("integer", 4), words) == [a * w for a, w in pairs]


@pytest.mark.parametrize("full", [False, True])
def test_significands(full):
    """All variants with 8 bits of significand each; the full code alone needs 7 and 6."""
    rng = np.random.default_rng(1)
    x, weights = Format(8, signed=False), [Format(8)] if full else variants(8)
    words, expected = [], []
    for _ in range(60):
        fmt, a, w = weights[rng.integers(len(weights))], rng.integers(256), rng.integers(256)
        value, weight = int(integers(x)[a]), int(integers(fmt)[w]) // (2 if full else 1)
        words.append((significand_word(value, 7 if full else 8), significand_word(weight, 6 if full else 8)))
        expected.append(value * weight)
    assert run(FixedElement("significand", 4, full), words) == expected


@pytest.mark.parametrize("mode", modes(), ids=lambda mode: f"w{mode.weight_bits}a{mode.activation_bits}")
def test_fused_integers_sum_all_lanes(mode):
    rng = np.random.default_rng(2)
    words, expected = [], []
    for _ in range(40):
        a = rng.integers(
            -(1 << mode.activation_bits - 1), 1 << mode.activation_bits - 1, (mode.activations, mode.lanes)
        )
        w = rng.integers(-(1 << mode.weight_bits - 1), 1 << mode.weight_bits - 1, (mode.activations, mode.lanes))
        word_a = word_w = 0
        for j in range(4):  # digit j of the weight side belongs to lane j · lanes / 4, and so on
            lane = j * mode.lanes // 4
            for i in range(4):
                part = i * mode.activations // 4
                digit_a = int(a[part, lane]) >> 2 * (i % (4 // mode.activations)) & 3
                digit_w = int(w[part, lane]) >> 2 * (j % (4 // mode.lanes)) & 3
                word_a |= digit_a << (8 * j + 2 * i)
                word_w |= digit_w << (8 * i + 2 * j)
        words.append((word_a, word_w))
        expected.append(int((a * w).sum()))
    assert run(FusedIntegerElement(4), words, mode) == expected


def test_the_table_has_all_of_them():
    for element in elements(8).values():  # elaborated, so that none is a name only
        Simulator(element)
