"""Decoders and encoder in hardware: every code, mode and variant against the number format."""

import numpy as np
import pytest
from combinational import Combinational

from dybit.accelerator.datapath import modes
from dybit.formats.format import Format, variants
from dybit.rtl.codec import MODE, VARIANT, ActivationDecoder, Encoder, WeightDecoder, mode_bits, variant_bits
from dybit.rtl.model import scaled, widen

narrowest = pytest.mark.parametrize("narrowest", [2, 4])


def word(layout, fields):
    return layout.const(fields).as_value().value


def bits(value, low, width):
    return value >> low & ((1 << width) - 1)


def formats_in(container, lowest, signs=(False, True)):
    """Every format that rides in a container: its own width and the narrower ones down to the next container."""
    return [f for b in range(lowest, container + 1) for sign in signs for f in variants(b, sign)]


LOWEST = {2: {2: 2, 4: 3, 8: 5}, 4: {4: 2, 8: 5}}


@narrowest
def test_activation_decoder_gives_the_integers_of_the_format(narrowest):
    decoder, digits = Combinational(ActivationDecoder(narrowest)), 8 // narrowest
    for mode in {m.activation_bits: m for m in modes(narrowest)}.values():
        width, per_code = mode.activation_bits, digits // mode.activations
        for fmt in formats_in(width, LOWEST[narrowest][width]):
            codes, variant = widen(fmt, width)
            # a field has the same code everywhere, then every code beside the complement of its index
            for second in (codes, codes[::-1]):
                fields = sum(
                    (codes if i % 2 == 0 else second).astype(np.int64) << i * width for i in range(mode.activations)
                )
                result = decoder(
                    field=fields, mode=word(MODE, mode_bits(mode)), variant=word(VARIANT, variant_bits(variant))
                )["word"]
                integers = scaled(fmt, width)
                for i in range(mode.activations):
                    significand, shifts = bits(result, i * width, width), result >> (8 + digits)
                    sign = bits(result, 8 + i * per_code, per_code)
                    assert set(np.unique(sign)) <= {0, (1 << per_code) - 1}  # all digits of a code agree
                    shift = {8: bits(shifts, 0, 3), 4: bits(shifts, 2 * i, 2), 2: 0}[width]
                    if width == 2:
                        significand = significand | bits(shifts, i, 1) << 2
                    expected = integers if i % 2 == 0 or second is codes else integers[::-1]
                    assert np.array_equal(np.where(sign, -1, 1) * (significand << shift), expected), (mode, fmt, i)


@narrowest
def test_weight_decoder_gives_the_integers_of_the_format(narrowest):
    decoder, digits = Combinational(WeightDecoder(narrowest)), 8 // narrowest
    marks_at = digits * digits * narrowest
    for mode in modes(narrowest):
        width = mode.weight_bits
        for fmt in formats_in(width, LOWEST[narrowest][width], signs=(True,)):
            codes, variant = widen(fmt, width)
            told = {f"variant__{j}": word(VARIANT, variant_bits(variant)) for j in range(digits)}
            raw = codes.astype(np.int64)[None] << np.arange(mode.macs)[:, None] * width  # every code in every place
            words = decoder(raw=raw.ravel(), mode=word(MODE, mode_bits(mode)), **told)["word"].reshape(raw.shape)
            for position, value in enumerate(words):
                i, lane = divmod(position, mode.lanes)
                for row in range(digits * i // mode.activations, digits * (i + 1) // mode.activations):
                    at = row * 8 + lane * width
                    half = 2 * (2 * row // digits) + 2 * lane // mode.lanes
                    significand = bits(value, at, width)
                    sign, shift = bits(value, marks_at + half, 1), bits(value, marks_at + 4 + 2 * half, 2)
                    if width == 2:
                        sign, flag = significand & 1, bits(value, marks_at + lane, 1)
                        spare = sign & (significand == 1) & (flag ^ 1)
                        significand, sign, shift = np.where(spare, 4, significand & 2 | flag), sign & ~spare, 0
                    if width == 8:
                        shift = shift | bits(value, marks_at + 12, 1) << 2
                    integers = np.where(sign, -1, 1) * (significand << shift)
                    assert np.array_equal(integers, scaled(fmt, width)), (mode, fmt, position)


@pytest.mark.parametrize("width", range(2, 9))
def test_encoder_rounds_every_value_as_the_format_does(width):
    encoder = Combinational(Encoder())
    value = np.arange(1 << 16)
    for fmt in (f for sign in (False, True) for f in variants(width, sign) if not f.midrise and not f.spare):
        for cut in (0, 1):
            for minus in (0, 1):
                code = encoder(
                    value=value, cut=cut, minus=minus, magnitude_bits=fmt.magnitude_bits, max_run=fmt.max_run,
                    negative=int(fmt.signed),
                )["code"]  # fmt: skip
                # what was cut is more than nothing and less than one unit
                expected = fmt.encode((value + cut / 2) / 256 * (1 - 2 * minus))
                assert np.array_equal(code, expected), (fmt, cut, minus)


def test_the_check_notices_a_wrong_format():
    decoder, fmt = Combinational(ActivationDecoder()), Format(8, True, 3)
    told = word(VARIANT, variant_bits(widen(Format(8, True, 4), 8)[1]))
    result = decoder(field=np.arange(256), mode=0, variant=told)["word"]
    magnitude = bits(result, 0, 8) << bits(result, 12, 3)
    assert not np.array_equal(magnitude, np.abs(scaled(fmt, 8)))
