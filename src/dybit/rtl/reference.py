"""Processing elements to compare the fused one with: fixed 8 bits in three ways, and fused integers.

Each has the registers of the fused one: operands, product, partial sum.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from dybit.accelerator.datapath import array_lane_bits
from dybit.rtl.codec import MODE
from dybit.rtl.pe import ProcessingElement


class FixedElement(wiring.Component):
    """One product of two 8-bit codes a cycle.

    Args:
        kind: ``int8``: two integers. ``integer``: two decoded DyBit codes as the integers that they stand for.
            ``significand``: two decoded DyBit codes as sign, significand and shift, as the fused element has them.
        rows: Rows of the array, which decide the width of the partial sum.
        full: For ``significand``, whether only the paper's DyBit is supported (``max_run = m``, unsigned by signed,
            mid-tread), whose significands are one and two bits shorter.
    """

    def __init__(self, kind: str, rows: int, full: bool = False) -> None:
        self.kind = kind
        bits = (rows - 1).bit_length()
        if kind == "int8":
            self.operands, self.product, total = (8, 8), 16, 16 + bits
        elif kind == "integer":  # 0 … 16384 and ±12288 with all variants
            self.operands, self.product, total = (16, 15), 29, array_lane_bits(rows)[0]
        elif full:  # 7-bit significand, shift to 7; sign, 6-bit significand, shift to 6: 2^14 · 2^12
            self.operands, self.product, total = (10, 10), 28, 28 + bits
        else:  # sign, 8-bit significand, shift to 7; the same
            self.operands, self.product, total = (12, 12), 29, array_lane_bits(rows)[0]
        self.sum_bits, self.full = total, full
        super().__init__({
            "activation": In(self.operands[0]),
            "activation_out": Out(self.operands[0]),
            "first": In(1),
            "first_out": Out(1),
            "weight": In(self.operands[1]),
            "sums": In(signed(total)),
            "sums_out": Out(signed(total)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Registers around one multiplication."""
        m = Module()
        a_word = Signal(self.operands[0], reset_less=True)
        a_weight = Signal(self.operands[1], reset_less=True)
        p_product = Signal(signed(self.product), reset_less=True)
        s_sum = Signal(signed(self.sum_bits), reset_less=True)
        m.d.sync += [a_word.eq(self.activation), self.first_out.eq(self.first)]
        with m.If(self.first):
            m.d.sync += a_weight.eq(self.weight)
        m.d.sync += [p_product.eq(self._multiply(a_word, a_weight)), s_sum.eq(self.sums + p_product)]
        m.d.comb += [self.activation_out.eq(a_word), self.sums_out.eq(s_sum)]
        return m

    def _multiply(self, a_word: Value, a_weight: Value) -> Value:
        if self.kind != "significand":
            return a_word.as_signed() * a_weight.as_signed()
        if self.full:
            product = a_word[:7] * a_weight[:6]
            shift, minus = a_word[7:10] + a_weight[6:9], a_weight[9]
        else:
            product = a_word[:8] * a_weight[:8]
            shift, minus = a_word[8:11] + a_weight[8:11], a_word[11] ^ a_weight[11]
        return Mux(minus, -product, product) << shift


class FusedIntegerElement(wiring.Component):
    """BitFusion's element: two's-complement integers of 2, 4 or 8 bits, all lanes summed into one partial sum.

    An activation word has 8 bits a digit column, so fewer weight bits take more activations a cycle: 64 divided by
    the weight bits.

    Args:
        rows: Rows of the array.
    """

    def __init__(self, rows: int) -> None:
        self.sum_bits = 16 + 2 + (rows - 1).bit_length()  # sixteen products of 2 bits, or one of 8 by 8
        super().__init__({
            "activation": In(32),
            "activation_out": Out(32),
            "first": In(1),
            "first_out": Out(1),
            "weight": In(32),
            "mode": In(MODE),
            "sums": In(signed(self.sum_bits)),
            "sums_out": Out(signed(self.sum_bits)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Sixteen blocks of two by two bits, shifted by their place and added."""
        m = Module()
        a_word, a_weight = Signal(32, reset_less=True), Signal(32, reset_less=True)
        p_product = Signal(signed(18), reset_less=True)
        s_sum = Signal(signed(self.sum_bits), reset_less=True)
        m.d.sync += [a_word.eq(self.activation), self.first_out.eq(self.first)]
        with m.If(self.first):
            m.d.sync += a_weight.eq(self.weight)
        columns = [self._column(a_word, a_weight, j) for j in range(4)]
        pairs = [low + Mux(self.mode.w2, high, high << 2) for low, high in (columns[:2], columns[2:])]
        whole = pairs[0] + Mux(self.mode.w2 | self.mode.w4, pairs[1], pairs[1] << 4)
        m.d.sync += [p_product.eq(whole), s_sum.eq(self.sums + p_product)]
        m.d.comb += [self.activation_out.eq(a_word), self.sums_out.eq(s_sum)]
        return m

    def _column(self, word: Value, weight: Value, j: int) -> Value:
        """The four blocks of digit j of the weight, each operand signed where its digit is the top one of a code."""
        mode = self.mode
        top_w = {0: mode.w2, 1: mode.w2 | mode.w4, 2: mode.w2, 3: 1}[j]
        blocks = []
        for i in range(4):
            top_a = {0: mode.a2, 1: mode.a2 | mode.a4, 2: mode.a2, 3: 1}[i]
            a = word[8 * j + 2 * i :][:2]
            w = weight[8 * i + 2 * j :][:2]
            blocks.append(Cat(a, a[1] & top_a).as_signed() * Cat(w, w[1] & top_w).as_signed())
        halves = [low + Mux(mode.a2, high, high << 2) for low, high in (blocks[:2], blocks[2:])]
        return halves[0] + Mux(mode.a2 | mode.a4, halves[1], halves[1] << 4)


def elements(rows: int) -> dict[str, wiring.Component]:
    """Returns the processing elements of the area table, by their names in it.

    Args:
        rows: Rows of the array that they are made for.
    """
    return {
        "int8": FixedElement("int8", rows),
        "dybit8_integer": FixedElement("integer", rows),
        "dybit8_significand": FixedElement("significand", rows),
        "dybit8_significand_full": FixedElement("significand", rows, full=True),
        "int_2_4_8": FusedIntegerElement(rows),
        "dybit_2_4_8": ProcessingElement(rows, 2),
        "dybit_4_8": ProcessingElement(rows, 4),
    }
