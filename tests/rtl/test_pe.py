"""The processing element in hardware: every pair of codes in every mode and variant, then its registers."""

import numpy as np
import pytest
from amaranth.sim import Simulator
from combinational import Combinational

from dybit.accelerator.datapath import Mode, array_lane_bits, modes
from dybit.formats.format import variants
from dybit.rtl.codec import MODE, VARIANT, ActivationDecoder, WeightDecoder, mode_bits, variant_bits
from dybit.rtl.model import integers, pack_fields, pe_sums, widen
from dybit.rtl.pe import Combiner, Multiplier, ProcessingElement


def word(layout, fields):
    return layout.const(fields).as_value().value


class Datapath:
    """Decoders and both halves of the product, without the registers between them."""

    def __init__(self, narrowest):
        self.digits = 8 // narrowest
        self.activation = Combinational(ActivationDecoder(narrowest))
        self.weight = Combinational(WeightDecoder(narrowest))
        self.multiplier = Combinational(Multiplier(narrowest))
        self.combiner = Combinational(Combiner(narrowest))

    def decoded_activations(self, mode, fmt, codes):
        told = word(VARIANT, variant_bits(widen(fmt, fmt.bits)[1]))
        field = pack_fields(codes, mode.activation_bits)
        return self.activation(field=field, mode=word(MODE, mode_bits(mode)), variant=told)["word"]

    def decoded_weights(self, mode, formats, codes):
        told = {
            f"variant__{j}": word(VARIANT, variant_bits(widen(formats[j % len(formats)], mode.weight_bits)[1]))
            for j in range(self.digits)
        }
        raw = pack_fields(codes.reshape(len(codes), -1), mode.weight_bits)
        return self.weight(raw=raw, mode=word(MODE, mode_bits(mode)), **told)["word"]

    def lanes(self, mode, activation, weight):
        told = word(MODE, mode_bits(mode))
        half = self.multiplier(activation=activation, weight=weight, mode=told)
        columns = {f"columns__{j}": half[f"columns__{j}"] for j in range(self.digits)}
        result = self.combiner(**columns, late=half["late"], mode=told)
        return np.stack([result[f"lanes__{j}"] for j in range(mode.lanes)], axis=-1)


DATAPATHS = {narrowest: Datapath(narrowest) for narrowest in (2, 4)}
CASES = [(narrowest, mode) for narrowest in (2, 4) for mode in modes(narrowest)]
cases = pytest.mark.parametrize(
    ("narrowest", "mode"), CASES, ids=[f"{n}-w{m.weight_bits}a{m.activation_bits}" for n, m in CASES]
)


def distinct(datapath, mode, of_weights):
    """Decoded words that differ, over all codes and variants of one operand, with their integers; others are zero."""
    words, values = [], []
    signs = (True,) if of_weights else (False, True)
    width = mode.weight_bits if of_weights else mode.activation_bits
    for fmt in (f for sign in signs for f in variants(width, sign)):
        codes = np.arange(1 << width)
        if of_weights:
            full = np.repeat(codes, mode.macs).reshape(-1, mode.activations, mode.lanes)
            words.append(datapath.decoded_weights(mode, [fmt], full))
        else:
            words.append(
                datapath.decoded_activations(
                    mode, fmt, np.repeat(codes, mode.activations).reshape(-1, mode.activations)
                )
            )
        values.append(integers(fmt))
    word, index = np.unique(np.concatenate(words), return_index=True)
    return word, np.concatenate(values)[index]


@cases
def test_every_pair_of_codes_of_every_variant(narrowest, mode):
    datapath = DATAPATHS[narrowest]
    (left, x), (right, w) = distinct(datapath, mode, False), distinct(datapath, mode, True)
    # the sign of a product is one exclusive or, so half of the signs of 8 bits by 8 bits are all
    if mode == Mode(8, 8):
        right, w = right[w >= 0], w[w >= 0]
    for start in range(0, len(left), 128):
        part = slice(start, start + 128)
        activation, weight = (grid.ravel() for grid in np.meshgrid(left[part], right, indexing="ij"))
        # the same code stands in every place of both words
        expected = (x[part, None] * w * mode.activations).ravel()
        lanes = datapath.lanes(mode, activation, weight)
        for lane in range(mode.lanes):
            assert np.array_equal(lanes[:, lane], expected)


@cases
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_different_codes_in_every_place(narrowest, mode, signed):
    datapath, rng = DATAPATHS[narrowest], np.random.default_rng(mode.macs)
    choices = variants(mode.weight_bits, True)
    for fmt in variants(mode.activation_bits, signed)[:: 3 if mode.activation_bits == 8 else 1]:
        formats = [choices[i] for i in rng.integers(0, len(choices), mode.lanes)]
        x = rng.integers(0, 1 << mode.activation_bits, (1000, mode.activations))
        w = rng.integers(0, 1 << mode.weight_bits, (1000, mode.activations, mode.lanes))
        weights = np.stack([integers(f)[w[..., lane]] for lane, f in enumerate(formats)], axis=-1)
        lanes = datapath.lanes(
            mode, datapath.decoded_activations(mode, fmt, x), datapath.decoded_weights(mode, formats, w)
        )
        assert np.array_equal(lanes, pe_sums(integers(fmt)[x], weights, mode))


@pytest.mark.parametrize("narrowest", [2, 4])
def test_registers_hold_weights_of_a_fold_and_add_to_the_sum_from_the_north(narrowest):
    mode, datapath, rng = Mode(4, 8), DATAPATHS[narrowest], np.random.default_rng(1)
    pe, widths = ProcessingElement(5, narrowest), array_lane_bits(5, narrowest)
    fmt, kind = variants(8, False)[-1], variants(4, True)[2]
    x, w = rng.integers(0, 256, (6, 1)), rng.integers(0, 16, (6, 1, 2))
    words = datapath.decoded_activations(mode, fmt, x)
    bus = datapath.decoded_weights(mode, [kind], w)
    held = [0, 0, 0, 3, 3, 3]  # folds begin at 0 and at 3; the bus changes in between all the same
    north = rng.integers(-1000, 1000, 6)
    expected = north + integers(fmt)[x[:, 0]] * integers(kind)[w[held, 0, 0]]
    seen = []

    async def bench(ctx):
        ctx.set(pe.mode, MODE.const(mode_bits(mode)))
        for cycle in range(9):
            if cycle < 6:
                ctx.set(pe.activation, int(words[cycle]))
                ctx.set(pe.first, cycle in (0, 3))
                ctx.set(pe.weight, int(bus[cycle]))
            if 2 <= cycle < 8:
                ctx.set(pe.sums, int(north[cycle - 2]) & ((1 << widths[0]) - 1))
            if cycle >= 3:
                low = ctx.get(pe.sums_out) & ((1 << widths[0]) - 1)
                seen.append(low - (low >> (widths[0] - 1) << widths[0]))
            if 1 <= cycle < 7:
                assert ctx.get(pe.activation_out) == words[cycle - 1]
                assert ctx.get(pe.first_out) == (cycle - 1 in (0, 3))
            await ctx.tick()

    simulator = Simulator(pe)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert seen == expected.tolist()
