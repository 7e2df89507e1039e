"""The edges of the array in hardware: banks of memory with their decoders, partial sums, requantizers and encoders.

Addresses arrive and are handed on to the next row or column.
"""

from __future__ import annotations

from functools import partial

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.data import StructLayout
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from dybit.accelerator.config import Config
from dybit.accelerator.datapath import FIELD_BITS, PIPE_STAGES, array_lane_bits, lane_bits
from dybit.rtl.codec import (
    MODE,
    VARIANT,
    ActivationDecoder,
    Encoder,
    WeightDecoder,
    activation_word_bits,
    weight_word_bits,
)
from dybit.rtl.model import MULTIPLIER_BITS, SHIFT_BITS
from dybit.rtl.sequencer import COUNT_BITS
from dybit.rtl.shared import Shared, place

# What travels along the rows and along the columns, one a cycle.
ROW_CONTROL = StructLayout({"first": 1, "address": COUNT_BITS})
WEIGHT_CONTROL = StructLayout({"address": COUNT_BITS, "channel": COUNT_BITS})
SUM_CONTROL = StructLayout(
    {"valid": 1, "k_first": 1, "k_last": 1, "last": 1, "step": COUNT_BITS, "channel": COUNT_BITS, "output": COUNT_BITS}
)
OUTPUT = StructLayout({"magnitude_bits": 4, "max_run": 4, "negative": 1, "relu": 1})
REQUANTIZE_STAGES = PIPE_STAGES["scale"] + PIPE_STAGES["encode"]
WRITE_TARGETS = {"activations": 0, "weights": 1, "variants": 2, "requantizers": 3}


def parameter_layout(config: Config) -> StructLayout:
    """Returns what the lanes of one column need to requantize one fold of output channels."""
    fields: dict[str, object] = {}
    for lane, bits in enumerate(lane_bits(config.reduction, config.narrowest)):
        fields |= {f"bias_{lane}": signed(bits), f"multiplier_{lane}": signed(MULTIPLIER_BITS)}
        fields |= {f"shift_{lane}": SHIFT_BITS}
    return StructLayout(fields)


def variant_layout(narrowest: int) -> StructLayout:
    """Returns the variants of the lanes of one column for one fold of output channels."""
    return StructLayout({f"lane_{lane}": VARIANT for lane in range(FIELD_BITS // narrowest)})


def channel_folds(config: Config) -> int:
    """Returns the folds of output channels that the banks of variants and parameters hold.

    Since each takes at least one tile of weights, there are never more than tiles that the weight banks hold.
    """
    return max(weight_depth(config) // config.rows, 1)


def weight_depth(config: Config) -> int:
    """Returns the words of a column's bank of weights, each of which is one row's."""
    return config.weight_sram * 8 // (config.columns * FIELD_BITS * (FIELD_BITS // config.narrowest))


def write_layout(config: Config) -> StructLayout:
    """Returns the port through which memories are filled: one word of one bank a cycle."""
    word = parameter_layout(config).size  # the widest of them
    return StructLayout({"enable": 1, "target": 2, "bank": 16, "address": COUNT_BITS, "data": word})


def _bank(m: Module, name: str, shape, depth: int, write, target: str, bank: int):
    """Adds a memory that the write port fills; returns its read port."""
    m.submodules[name] = memory = Memory(shape=shape, depth=depth, init=[])
    port = memory.write_port()
    m.d.comb += [
        port.addr.eq(write.address),
        port.data.eq(write.data),
        port.en.eq(write.enable & (write.target == WRITE_TARGETS[target]) & (write.bank == bank)),
    ]
    return memory.read_port()


class Row(wiring.Component):
    """Feeds one row of the array: its bank of activations and its decoder, two cycles from address to word.

    Args:
        config: The accelerator.
        index: Number of the row, which is the number of its bank.
    """

    def __init__(self, config: Config, index: int) -> None:
        self.config, self.index = config, index
        super().__init__({
            "write": In(write_layout(config)),
            "mode": In(MODE),
            "variant": In(VARIANT),
            "control": In(ROW_CONTROL),
            "control_out": Out(ROW_CONTROL),
            "word": Out(activation_word_bits(config.narrowest)),
            "first": Out(1),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Read, decode; hand the address on."""
        m = Module()
        depth = self.config.activation_sram // self.config.rows
        bank = _bank(m, "bank", FIELD_BITS, depth, self.write, "activations", self.index)
        m.submodules.decoder = decoder = ActivationDecoder(self.config.narrowest)
        r_first = Signal()
        m.d.comb += [
            bank.addr.eq(self.control.address),
            decoder.field.eq(bank.data),
            decoder.mode.eq(self.mode),
            decoder.variant.eq(self.variant),
        ]
        m.d.sync += [
            self.control_out.eq(self.control),
            r_first.eq(self.control.first),
            self.first.eq(r_first),
            self.word.eq(decoder.word),
        ]
        return m


class WeightEdge(wiring.Component):
    """Feeds one column of the array: its banks of weights and of their variants, and its decoder; two cycles."""

    def __init__(self, config: Config, index: int) -> None:
        self.config, self.index = config, index
        super().__init__({
            "write": In(write_layout(config)),
            "mode": In(MODE),
            "control": In(WEIGHT_CONTROL),
            "control_out": Out(WEIGHT_CONTROL),
            "word": Out(weight_word_bits(config.narrowest)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Read weights and variants of the lanes, decode; hand the addresses on."""
        m = Module()
        config = self.config
        m.submodules.decoder = decoder = WeightDecoder(config.narrowest)
        weights = _bank(m, "weights", decoder.raw_bits, weight_depth(config), self.write, "weights", self.index)
        layout = variant_layout(config.narrowest)
        variants = _bank(m, "variants", layout.size, channel_folds(config), self.write, "variants", self.index)
        lanes = layout(variants.data)
        m.d.comb += [
            weights.addr.eq(self.control.address),
            variants.addr.eq(self.control.channel),
            decoder.raw.eq(weights.data),
            decoder.mode.eq(self.mode),
            *(decoder.variant[i].eq(lanes[f"lane_{i}"]) for i in range(decoder.digits)),
        ]
        m.d.sync += [self.control_out.eq(self.control), self.word.eq(decoder.word)]
        return m


class Accumulator(wiring.Component):
    """Adds up the K folds of one column in its bank of partial sums.

    The control comes one cycle before the lanes, so that the bank has been read when they arrive. A fold may be as
    short as one row: the bank's read port sees what is written in the same cycle.

    Members:
        control: View of ``SUM_CONTROL``.
        lanes: Packed lanes of the array.
        sums: Packed accumulated lanes, two cycles after ``control``.
        done: Its control, where the sums are complete.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.lanes_in = array_lane_bits(config.rows, config.narrowest)
        self.lanes_out = lane_bits(config.reduction, config.narrowest)
        super().__init__({
            "control": In(SUM_CONTROL),
            "control_out": Out(SUM_CONTROL),
            "lanes": In(sum(self.lanes_in)),
            "sums": Out(sum(self.lanes_out)),
            "done": Out(SUM_CONTROL),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Read, add, write back."""
        m = Module()
        m.submodules.bank = bank = Memory(shape=sum(self.lanes_out), depth=self.config.sum_rows, init=[])
        write = bank.write_port()
        read = bank.read_port(transparent_for=(write,))
        now = Signal(SUM_CONTROL)  # the control of the lanes that are here
        totals, at_in, at_out = [], 0, 0
        for width_in, width_out in zip(self.lanes_in, self.lanes_out, strict=True):
            lane = self.lanes[at_in : at_in + width_in].as_signed()
            old = Mux(now.k_first, 0, read.data[at_out : at_out + width_out]).as_signed()
            totals.append((old + lane)[:width_out])
            at_in, at_out = at_in + width_in, at_out + width_out
        m.d.comb += [
            read.addr.eq(self.control.step),
            write.addr.eq(now.step),
            write.en.eq(now.valid),
            write.data.eq(Cat(*totals)),
        ]
        m.d.sync += [
            now.eq(self.control),
            self.control_out.eq(self.control),
            self.sums.eq(write.data),
            self.done.eq(now),
            self.done.valid.eq(now.valid & now.k_last),
        ]
        return m


class Requantizer(wiring.Component):
    """Turns the complete sum of one lane into a code: bias, multiplier, magnitude, shift and ReLU, encoder.

    Each is one cycle.

    Args:
        bits: Width of the sum and of the bias.

    Members:
        sum, bias, multiplier, shift: Of the same output, in the same cycle.
        output: View of ``OUTPUT``, constant while a layer runs.
        code: The code, ``REQUANTIZE_STAGES`` cycles later.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        super().__init__({
            "sum": In(signed(bits)),
            "bias": In(signed(bits)),
            "multiplier": In(signed(MULTIPLIER_BITS)),
            "shift": In(SHIFT_BITS),
            "output": In(OUTPUT),
            "code": Out(8),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """One register after each operation."""
        m = Module()
        m.submodules.encoder = encoder = Encoder()
        b_sum, b_multiplier = Signal(signed(self.bits + 1)), Signal.like(self.multiplier)
        b_shift, p_shift = Signal(SHIFT_BITS), Signal(SHIFT_BITS)
        p_product = Signal(signed(self.bits + 1 + MULTIPLIER_BITS))
        m.d.sync += [b_sum.eq(self.sum + self.bias), b_multiplier.eq(self.multiplier), b_shift.eq(self.shift)]
        m.d.sync += [p_product.eq(b_sum * b_multiplier), p_shift.eq(b_shift)]
        a_size, a_minus, a_shift = Signal(len(p_product)), Signal(), Signal(SHIFT_BITS)
        m.d.sync += [a_size.eq(Mux(p_product < 0, -p_product, p_product)), a_minus.eq(p_product < 0)]
        m.d.sync += a_shift.eq(p_shift)
        whole = Signal(len(a_size))
        m.d.comb += whole.eq(a_size >> a_shift)
        dropped = a_size & Cat(*(a_shift > i for i in range(len(a_size))))
        silent = self.output.relu & a_minus
        e_value, e_cut, e_minus = Signal(16), Signal(), Signal()
        m.d.sync += [
            e_value.eq(Mux(silent, 0, Mux(whole[16:].any(), 0xFFFF, whole))),
            e_cut.eq(~silent & dropped.any()),
            e_minus.eq(a_minus),
        ]
        m.d.comb += [
            encoder.value.eq(e_value),
            encoder.cut.eq(e_cut),
            encoder.minus.eq(e_minus),
            encoder.magnitude_bits.eq(self.output.magnitude_bits),
            encoder.max_run.eq(self.output.max_run),
            encoder.negative.eq(self.output.negative),
        ]
        m.d.sync += self.code.eq(encoder.code)
        return m


class OutputEdge(wiring.Component):
    """Takes what leaves one column: partial sums in, codes of all its lanes out.

    Members:
        lanes: Packed lanes of the array.
        valid, last, address: Of the codes, which are those of all lanes of one row of the input.
        codes: Eight bits for every lane.
    """

    def __init__(self, config: Config, index: int, shared: Shared | None = None) -> None:
        self.config, self.index, self.shared = config, index, shared
        self.lane_bits = lane_bits(config.reduction, config.narrowest)
        super().__init__({
            "write": In(write_layout(config)),
            "output": In(OUTPUT),
            "control": In(SUM_CONTROL),
            "control_out": Out(SUM_CONTROL),
            "lanes": In(sum(array_lane_bits(config.rows, config.narrowest))),
            "valid": Out(1),
            "last": Out(1),
            "address": Out(COUNT_BITS),
            "codes": Out(8 * len(self.lane_bits)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Accumulate, then requantize every lane with the parameters of its output channel."""
        m = Module()
        config = self.config
        m.submodules.accumulator = accumulator = Accumulator(config)
        layout = parameter_layout(config)
        bank = _bank(m, "parameters", layout.size, channel_folds(config), self.write, "requantizers", self.index)
        parameters = layout(bank.data)
        channel = Signal(COUNT_BITS)  # of the lanes that are added up in this cycle
        m.d.sync += channel.eq(self.control.channel)
        m.d.comb += [
            accumulator.control.eq(self.control),
            accumulator.lanes.eq(self.lanes),
            self.control_out.eq(accumulator.control_out),
            bank.addr.eq(channel),
        ]
        at = 0
        for lane, bits in enumerate(self.lane_bits):
            requantizer = place(
                m, f"requantizer_{lane}", partial(Requantizer, bits), f"requantizer_{bits}", self.shared
            )
            m.d.comb += [
                requantizer.sum.eq(accumulator.sums[at : at + bits].as_signed()),
                requantizer.bias.eq(parameters[f"bias_{lane}"]),
                requantizer.multiplier.eq(parameters[f"multiplier_{lane}"]),
                requantizer.shift.eq(parameters[f"shift_{lane}"]),
                requantizer.output.eq(self.output),
                self.codes[8 * lane : 8 * lane + 8].eq(requantizer.code),
            ]
            at += bits
        self._delay(m, accumulator.done)
        return m

    def _delay(self, m: Module, done) -> None:
        """Carries valid, last and the address beside the requantizers."""
        stage = Cat(done.valid, done.valid & done.last, done.output)
        for i in range(REQUANTIZE_STAGES):
            following = Signal(len(stage), name=f"delay_{i}")
            m.d.sync += following.eq(stage)
            stage = following
        m.d.comb += Cat(self.valid, self.last, self.address).eq(stage)
