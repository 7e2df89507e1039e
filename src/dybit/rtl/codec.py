"""Decoders and encoder in hardware: raw fields to significands with shifts, fixed-point values to codes."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.data import StructLayout
from amaranth.lib.wiring import In, Out

from dybit.accelerator.datapath import FIELD_BITS, Mode
from dybit.rtl.model import Variant

# Which containers run; neither bit of a pair set means 8.
MODE = StructLayout({"a4": 1, "a2": 1, "w4": 1, "w2": 1})
VARIANT = StructLayout({"negative": 1, "max_run": 4, "midrise": 1, "spare": 1})


def activation_word_bits(narrowest: int) -> int:
    """Returns the width of a decoded activation word: digits, a sign for each, 4 bits of shift."""
    return FIELD_BITS + FIELD_BITS // narrowest + 4


def weight_word_bits(narrowest: int) -> int:
    """Returns the width of a decoded weight word: a digit for every block, 4 signs, 4 shifts of 2 bits and one more."""
    return (FIELD_BITS // narrowest) ** 2 * narrowest + 4 + 8 + 1


def mode_bits(mode: Mode) -> dict[str, bool]:
    """Returns the fields of ``MODE`` for a mode of the datapath."""
    return {
        "a4": mode.activation_bits == 4,
        "a2": mode.activation_bits == 2,
        "w4": mode.weight_bits == 4,
        "w2": mode.weight_bits == 2,
    }


def variant_bits(variant: Variant) -> dict[str, int]:
    """Returns the fields of ``VARIANT`` for a variant of the model; ``negative`` says that there is a sign."""
    return {
        "negative": variant.signed,
        "max_run": variant.max_run,
        "midrise": variant.midrise,
        "spare": variant.spare,
    }


def decode(code: Value, variant) -> tuple[Value, Value, Value]:
    """Returns significand, shift and sign of a container: ``integer = ±(significand << shift)``.

    The magnitude is the code itself where it is unsigned, else the code without its sign and with the mid-rise flag
    appended, so one table serves all variants. With i leading ones (at most r) the significand is the magnitude with
    min(i, r - 1) bits shifted out and its top bit set where i > 0, and the shift is i - 1:

        1 1 0 m m m m m     i = 2    significand 1 m m m m m 0 0    shift 1
        0 x x x x x x x     i = 0    significand 0 x x x x x x x    shift 0

    Args:
        code: The container, 2, 4 or 8 bits.
        variant: View of ``VARIANT``.
    """
    bits = len(code)
    signed = variant.negative
    magnitude = Mux(signed, Cat(variant.midrise, code[:-1]), code)
    ones = [magnitude[bits - k :].all() for k in range(1, bits + 1)]  # the top k bits are ones
    shift: Value = Const(0)
    moved: Value = Const(0)
    for k in range(1, bits + 1):
        reached = ones[k - 1] & (variant.max_run >= k)
        shift = Mux(reached, k - 1, shift)
        if k < bits:
            moved = Mux(ones[k - 1] & (variant.max_run > k), k, moved)
    width = (bits - 1).bit_length()
    significand = (magnitude << moved)[:bits]
    significand = Cat(significand[:-1], significand[-1] | magnitude[-1])
    sign = signed & code[-1]
    # the code of negative zero: 5/2 is 101000… shifted by one, in 2 bits 10 is all that is left of it
    spare = variant.spare & signed & code[-1] & ~code[:-1].any()
    significand = Mux(spare, 5 << bits >> 3, significand)
    shift = Mux(spare, 1, shift)
    sign = sign & ~spare
    return significand[:bits], shift[:width], sign


class ActivationDecoder(wiring.Component):
    """Turns one raw 8-bit field into one word for a row of PEs; purely combinational.

    The word has the digits of 1, 2 or 4 significands (8 bits), a sign for every digit, and 4 bits of shift: 3 for one
    code of 8 bits, 2 each for two of 4 bits. A 2-bit code is its integer: the digit, and as "shift" whether it is 4.

    Args:
        narrowest: Width of a digit: 2, or 4 without 2-bit lanes.
    """

    def __init__(self, narrowest: int = 2) -> None:
        self.digit = narrowest
        self.digits = FIELD_BITS // narrowest
        super().__init__(
            {"field": In(8), "mode": In(MODE), "variant": In(VARIANT), "word": Out(activation_word_bits(narrowest))}
        )

    def elaborate(self, platform) -> Module:
        """Decodes in every width and selects."""
        m = Module()
        significand, shift, sign = decode(self.field, self.variant)
        word = Cat(significand, sign.replicate(self.digits), shift, 0)
        parts = [decode(self.field[i : i + 4], self.variant) for i in (0, 4)]
        signs = [part[2].replicate(self.digits // 2) for part in parts]
        word = Mux(self.mode.a4, Cat(*(part[0] for part in parts), *signs, *(part[1] for part in parts)), word)
        if self.digit == 2:
            parts = [decode(self.field[i : i + 2], self.variant) for i in (0, 2, 4, 6)]
            # the only 2-bit integer beyond 3 is 4, a significand of 2 shifted by 1
            digits = [Mux(part[1], 0, part[0]) for part in parts]
            pairs = Cat(*digits, *(part[2] for part in parts), *(part[1] for part in parts))
            word = Mux(self.mode.a2, pairs, word)
        m.d.comb += self.word.eq(word)
        return m


class WeightDecoder(wiring.Component):
    """Turns the raw weights of one PE into the word that it holds; purely combinational.

    The code for activation i and lane l stands at bit (i · lanes + l) · weight bits. The word has, from bit 0, a digit
    for every block of the multiplier, repeated where blocks share a weight so that the PE needs no multiplexers;
    4 signs; 4 shifts of 2 bits; and the third bit of an 8-bit code's shift. A 2-bit weight is its magnitude bit and
    its sign in the digit, and the 4 sign bits hold the lanes' mid-rise flags, which complete the significands. Negative
    zero without that flag is the spare level; where a lane has none, it becomes zero.

    Args:
        narrowest: Width of a digit: 2, or 4 without 2-bit lanes.
    """

    def __init__(self, narrowest: int = 2) -> None:
        self.digit = narrowest
        self.digits = FIELD_BITS // narrowest
        self.raw_bits = FIELD_BITS * self.digits
        super().__init__({
            "raw": In(self.raw_bits),
            "mode": In(MODE),
            "variant": In(VARIANT).array(self.digits),
            "word": Out(weight_word_bits(narrowest)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Decodes in every width and selects."""
        m = Module()
        word = self._of_8()
        four = Mux(self.mode.a4, self._of_4(2), self._of_4(1))
        word = Mux(self.mode.w4, four, word)
        if self.digit == 2:
            two = Mux(self.mode.a2, self._of_2(4), Mux(self.mode.a4, self._of_2(2), self._of_2(1)))
            word = Mux(self.mode.w2, two, word)
        m.d.comb += self.word.eq(word)
        return m

    def _of_8(self) -> Value:
        significand, shift, sign = decode(self.raw[:8], self.variant[0])
        return Cat(significand.replicate(self.digits), sign.replicate(4), shift[:2].replicate(4), shift[2])

    def _of_4(self, activations: int) -> Value:
        """Two lanes; with one activation both rows of blocks hold the same weights."""
        rows = []
        for i in range(activations):
            codes = [self.raw[(2 * i + lane) * 4 :][:4] for lane in (0, 1)]
            rows.append([decode(code, self.variant[lane]) for lane, code in enumerate(codes)])
        digits = [Cat(*(part[0] for part in row)).replicate(self.digits // activations) for row in rows]
        signs, shifts = ([Cat(*(part[i] for part in row)).replicate(2 // activations) for row in rows] for i in (2, 1))
        return Cat(*digits, *signs, *shifts, 0)

    def _of_2(self, activations: int) -> Value:
        """Four lanes; a raw code is sign and magnitude already, but for the negative zero of plain ones."""
        keeps = [variant.midrise | variant.spare for variant in self.variant]
        digits = []
        for i in range(activations):
            codes = [self.raw[(4 * i + lane) * 2 :][:2] for lane in range(4)]
            row = Cat(*(Cat(code[1] & (code[0] | keep), code[0]) for code, keep in zip(codes, keeps, strict=True)))
            digits.append(row.replicate(4 // activations))
        flags = Cat(*(variant.midrise for variant in self.variant))
        return Cat(*digits, flags, Const(0, 9))


class Encoder(wiring.Component):
    """Turns a fixed-point value into the nearest code, ties to even; purely combinational.

    The value is written as the code that it would have with more magnitude bits; its first m bits are the code below
    the value, the next is half a step, whatever the binade. Rounding therefore adds one to an integer.

    Members:
        value: Magnitude in units of 2^-8, saturated to 16 bits.
        cut: Whether more bits below were not zero.
        minus: Whether the value is negative.
        magnitude_bits: The format's m, 1 to 8.
        max_run: The format's r.
        negative: Whether the format has a sign; negative values become zero where not.
        code: The code, of m bits and the sign if there is one.
    """

    def __init__(self) -> None:
        super().__init__({
            "value": In(16),
            "cut": In(1),
            "minus": In(1),
            "magnitude_bits": In(4),
            "max_run": In(4),
            "negative": In(1),
            "code": Out(8),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Prefix by leading-one detection, then cut at m bits and round."""
        m = Module()
        run = Signal(4)  # 0 for values below 1, else one more than the exponent, at most max_run
        found = 0
        for i in range(1, 9):
            found = Mux(self.value[7 + i :].any() & (self.max_run >= i), i, found)
        # the bits below the leading one (below the point if no bit is set), left-aligned
        fraction = Signal(16)
        string = Signal(25)
        cut_at = Signal(33)
        below, half, most = Signal(8), Signal(), Signal(8)
        # run ones, a zero unless the run has its longest length, the fraction
        prefix = run + (run < self.max_run)
        ones = ~(Const((1 << 25) - 1, 25) >> run)[:25]
        m.d.comb += [
            run.eq(found),
            fraction.eq(Mux(run == 0, self.value << 8, self.value << (9 - run)[:4])),
            string.eq(ones | Cat(Const(0, 9), fraction) >> prefix),
            cut_at.eq(string << self.magnitude_bits),
            below.eq(cut_at[25:]),
            half.eq(cut_at[24]),
            most.eq((Const(0xFF00, 16) << self.magnitude_bits)[16:24]),
        ]
        up = half & (cut_at[:24].any() | self.cut | below[0])
        beyond = (run == self.max_run) & (self.value >> (8 + run)).any()
        magnitude = Signal(8)
        m.d.comb += magnitude.eq(Mux(beyond | (below == most), most, below + up))
        sign = self.minus & magnitude.any()
        m.d.comb += self.code.eq(
            Mux(self.negative, magnitude | (sign << self.magnitude_bits)[:8], Mux(self.minus, 0, magnitude))
        )
        return m
