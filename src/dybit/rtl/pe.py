"""The fused processing element in hardware: a multiplier made of small blocks of significands, and its registers.

Its operands arrive decoded.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from dybit.accelerator.datapath import FIELD_BITS, array_lane_bits
from dybit.rtl.codec import MODE, activation_word_bits, weight_word_bits

PRODUCT_BITS = 29  # the widest sum that a PE makes: 16384 · 12288 and its sign


def column_bits(narrowest: int) -> int:
    """Returns the width of the sum of a column of blocks: an 8-bit significand times a digit, shifted by up to 7."""
    return (255 * ((1 << narrowest) - 1) << 7).bit_length() + 1


class Multiplier(wiring.Component):
    """First half of the product of one activation word and one weight word; purely combinational.

    Significands are cut into digits of ``narrowest`` bits, and a block multiplies one digit of each side. What differs
    between the modes is only with which weight blocks are added. Down a column of blocks:

        one 8-bit activation     digits of one significand: weights 1, 4, 16, 64
        two 4-bit activations    1, 4 and again 1, 4: two products of one lane
        four 2-bit activations   1, 1, 1, 1: four products of one lane

    Blocks carry the sign and the shift of their product, so the sums need no correction.

    Args:
        narrowest: Width of a digit: 2, or 4 without 2-bit lanes.

    Members:
        activation: Word of an ``ActivationDecoder``.
        weight: Word of a ``WeightDecoder``.
        mode: View of ``MODE``.
        columns: For every column of blocks its signed sum.
        late: For each half of the columns whether its sum is still to be shifted by eight.
    """

    def __init__(self, narrowest: int = 2) -> None:
        self.digit = narrowest
        self.digits = FIELD_BITS // narrowest
        super().__init__({
            "activation": In(activation_word_bits(narrowest)),
            "weight": In(weight_word_bits(narrowest)),
            "mode": In(MODE),
            "columns": Out(signed(column_bits(narrowest))).array(self.digits),
            "late": Out(2),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Blocks, then shifts where numbers are narrow, then sums."""
        m = Module()
        shifts = [[Signal(4, name=f"shift_{f}{lane}") for lane in (0, 1)] for f in (0, 1)]
        for f in (0, 1):
            for lane in (0, 1):
                m.d.comb += shifts[f][lane].eq(self._shift(f, lane))
        # only one 8-bit activation shifts by more than seven, and then both halves agree
        m.d.comb += self.late.eq(Cat(shifts[0][0][3], shifts[0][1][3]))
        for j in range(self.digits):
            lane = 2 * j // self.digits
            halves = [self._half(f, j) << shifts[f][lane][:3] for f in (0, 1)]
            apart = self.mode.a4 | self.mode.a2
            m.d.comb += self.columns[j].eq(halves[0] + Mux(apart, halves[1], halves[1] << 4))
        return m

    def _shift(self, f: int, lane: int) -> Value:
        """Shift of the products of half f of the activation word and half ``lane`` of the weight word: 0 to 13."""
        word = self.activation[8 + self.digits :]
        activation = Mux(self.mode.a4, word[2 * f :][:2], word[:3])
        if self.digit == 2:
            activation = Mux(self.mode.a2, 0, activation)  # those bits belong to the digits
        word = self.weight[self.digits**2 * self.digit + 4 :]
        return activation + Cat(word[2 * (2 * f + lane) :][:2], word[8])

    def _half(self, f: int, j: int) -> Value:
        """The sum of the blocks of half f of the activation word in column j."""
        if self.digit == 4:
            return self._block(f, j)
        low, high = self._block(2 * f, j), self._block(2 * f + 1, j)
        return low + Mux(self.mode.a2, high, high << 2)

    def _block(self, i: int, j: int) -> Value:
        """The signed product of digit i of the activation and its digit of the weight in column j."""
        width, count = self.digit, self.digits
        digit, minus = self.activation[i * width :][:width], self.activation[8 + i]
        weight = self.weight[(i * count + j) * width :][:width]
        marks = self.weight[count * count * width :][:4]
        sign = marks[2 * (2 * i // count) + 2 * j // count]
        if width == 4:
            product = digit * weight
        else:
            # a 2-bit weight is sign and magnitude; its lane's mid-rise flag completes the significand; negative zero
            # is the spare level, 4, as an activation may be 4: the digit of either is then 0
            two = self.mode.w2
            spare = two & weight[0] & ~weight[1] & ~marks[j]
            sign = Mux(two, weight[0] & ~spare, sign)
            weight = Cat(Mux(two, marks[j], weight[0]), weight[1])
            four = self.mode.a2 & self.activation[8 + count + i]
            shifted = weight & four.replicate(2) | digit & spare.replicate(2)
            product = digit * weight | Cat(Const(0, 2), shifted, four & spare)
        return Mux(sign ^ minus, -product, product)


class Combiner(wiring.Component):
    """Second half of the product: the columns of blocks that one weight spans are added; purely combinational.

    Args:
        narrowest: Width of a digit.

    Members:
        columns: Sums of a ``Multiplier``.
        late: Its late shifts.
        mode: View of ``MODE``.
        lanes: What the PE adds to each lane; lanes that the mode does not use are arbitrary.
    """

    def __init__(self, narrowest: int = 2) -> None:
        self.digits = FIELD_BITS // narrowest
        super().__init__({
            "columns": In(signed(column_bits(narrowest))).array(self.digits),
            "late": In(2),
            "mode": In(MODE),
            "lanes": Out(signed(PRODUCT_BITS)).array(self.digits),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Two columns make a 4-bit weight, two of those an 8-bit one."""
        m = Module()
        columns = list(self.columns)
        pairs = columns if self.digits == 2 else [columns[2 * i] + (columns[2 * i + 1] << 2) for i in (0, 1)]
        pairs = [Mux(self.late[i], pair << 8, pair) for i, pair in enumerate(pairs)]
        whole = pairs[0] + (pairs[1] << 4)
        full = ~(self.mode.w4 | self.mode.w2)
        if self.digits == 2:
            lanes = [Mux(full, whole, pairs[0]), pairs[1]]
        else:
            # a 2-bit weight is alone in its column, but shares the late shift with its neighbour: 8-bit activations
            # shift by at most 7 there, so it is not set
            lanes = [Mux(full, whole, Mux(self.mode.w4, pairs[0], columns[0]))]
            lanes += [Mux(self.mode.w4, pairs[1], columns[1]), *columns[2:]]
        m.d.comb += [lane.eq(value) for lane, value in zip(self.lanes, lanes, strict=True)]
        return m


class ProcessingElement(wiring.Component):
    """One element of the array: operand registers, product register, partial-sum register.

    Args:
        rows: Rows of the array, which decide the width of the lanes.
        narrowest: Narrowest container: 2 or 4.

    Members:
        activation, first: Word of this cycle from the west, and whether it is the first of a fold; it also loads the
            weights.
        activation_out, first_out: The same one cycle later, to the east.
        weight: The column's weight bus.
        sums: Lanes from the north.
        sums_out: Lanes to the south: three cycles after the activation they include.
        mode: View of ``MODE``.
    """

    def __init__(self, rows: int, narrowest: int = 2) -> None:
        self.narrowest = narrowest
        self.lane_bits = array_lane_bits(rows, narrowest)
        word = activation_word_bits(narrowest)
        super().__init__({
            "activation": In(word),
            "activation_out": Out(word),
            "first": In(1),
            "first_out": Out(1),
            "weight": In(weight_word_bits(narrowest)),
            "mode": In(MODE),
            "sums": In(sum(self.lane_bits)),
            "sums_out": Out(sum(self.lane_bits)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Registers between the two halves of the product."""
        m = Module()
        m.submodules.multiplier = multiplier = Multiplier(self.narrowest)
        m.submodules.combiner = combiner = Combiner(self.narrowest)
        # Data registers have no reset: what they hold before the first fold is never used.
        a_word = Signal(self.activation.shape(), reset_less=True)
        a_weight = Signal(self.weight.shape(), reset_less=True)
        p_columns = [
            Signal.like(column, name=f"p_column_{i}", reset_less=True) for i, column in enumerate(multiplier.columns)
        ]
        p_late = Signal(2, reset_less=True)
        s_sums = Signal(self.sums.shape(), reset_less=True)
        m.d.sync += [a_word.eq(self.activation), self.first_out.eq(self.first)]
        with m.If(self.first):
            m.d.sync += a_weight.eq(self.weight)
        m.d.comb += [
            multiplier.activation.eq(a_word),
            multiplier.weight.eq(a_weight),
            multiplier.mode.eq(self.mode),
            combiner.mode.eq(self.mode),
            combiner.late.eq(p_late),
            self.activation_out.eq(a_word),
            self.sums_out.eq(s_sums),
        ]
        m.d.sync += p_late.eq(multiplier.late)
        for i, column in enumerate(p_columns):
            m.d.sync += column.eq(multiplier.columns[i])
            m.d.comb += combiner.columns[i].eq(column)
        sums, at = [], 0
        for lane, width in zip(combiner.lanes, self.lane_bits, strict=True):
            sums.append((self.sums[at : at + width].as_signed() + lane)[:width])
            at += width
        m.d.sync += s_sums.eq(Cat(*sums))
        return m
