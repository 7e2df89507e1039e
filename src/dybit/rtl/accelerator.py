"""The whole accelerator in hardware: array, edges with their memories, and the controllers that run a layer."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.data import StructLayout
from amaranth.lib.wiring import In, Out

from dybit.accelerator.config import Config
from dybit.errors import DyBitError
from dybit.rtl.array import Array
from dybit.rtl.codec import MODE, VARIANT
from dybit.rtl.edges import OUTPUT, ROW_CONTROL, SUM_CONTROL, WEIGHT_CONTROL, OutputEdge, Row, WeightEdge, write_layout
from dybit.rtl.sequencer import COUNT_BITS, SIZES, Sequencer
from dybit.rtl.shared import Shared

LAYER = StructLayout({"mode": MODE, "variant": VARIANT, "output": OUTPUT, "sizes": SIZES})
# Cycles by which what leaves column 0 lags behind what enters row 0, less the rows: see PIPE_STAGES.
SUM_DELAY = 4


def check_hardware(config: Config) -> None:
    """Checks that there is hardware for a config.

    Raises:
        DyBitError: The config asks for lanes summed together, SCALE-Sim's schedule, elements that are not fused, or a
            narrow weight port; these exist in the simulator only.
    """
    if config.fuse != "split" or config.schedule != "jit":
        raise DyBitError(f"hardware needs fuse='split' and schedule='jit', not {config.fuse!r}, {config.schedule!r}")
    if config.narrowest == 8:
        raise DyBitError("narrowest must be 2 or 4 for the hardware, whose elements are fused, not 8")
    raw = 64 // config.narrowest
    if config.weight_port < raw:
        raise DyBitError(f"weight_port must be at least {raw} bits for the hardware, not {config.weight_port}")


class Accelerator(wiring.Component):
    """Runs one layer that fits its memories, from start to the last encoded output.

    Args:
        config: The accelerator; ``fuse`` must be ``split`` and the weight port wide enough for one row a cycle.
        shared: Where parts that are many are written once and referred to, or None to have them in every place.

    Members:
        write: Port through which the memories are filled, view of ``write_layout(config)``.
        layer: View of ``LAYER``; constant while busy.
        start: Begins the layer.
        busy: From the cycle after ``start`` to the last output.
        cycles: Cycles since ``start``; stands still when the last output has appeared.
        valid, address, codes: Outputs of every column.

    Raises:
        DyBitError: The hardware does not do what ``config`` asks for.
    """

    def __init__(self, config: Config, shared: Shared | None = None) -> None:
        check_hardware(config)
        self.config, self.shared = config, shared
        columns = config.columns
        super().__init__({
            "write": In(write_layout(config)),
            "layer": In(LAYER),
            "start": In(1),
            "busy": Out(1),
            "cycles": Out(32),
            "valid": Out(1).array(columns),
            "address": Out(COUNT_BITS).array(columns),
            "codes": Out(64 // config.narrowest).array(columns),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Wires controllers, edges and array, and counts cycles."""
        m = Module()
        config = self.config
        m.submodules.array = array = Array(config.rows, config.columns, config.narrowest, self.shared)
        m.submodules.entering = entering = Sequencer(config.rows)
        m.submodules.leaving = leaving = Sequencer(config.rows)
        m.d.comb += [
            array.mode.eq(self.layer.mode),
            entering.sizes.eq(self.layer.sizes),
            entering.start.eq(self.start),
            leaving.sizes.eq(self.layer.sizes),
        ]
        wait = Signal(config.rows + SUM_DELAY)
        m.d.sync += wait.eq(wait << 1 | self.start)
        m.d.comb += leaving.start.eq(wait[-1])
        self._feed(m, array, entering)
        self._drain(m, array, leaving)
        return m

    def _feed(self, m: Module, array: Array, entering: Sequencer) -> None:
        """Rows and weight edges, each a cycle after its neighbour."""
        row_control, weight_control = Signal(ROW_CONTROL), Signal(WEIGHT_CONTROL)
        m.d.sync += [
            row_control.first.eq(entering.first),
            row_control.address.eq(entering.activation),
            weight_control.address.eq(entering.weight),
            weight_control.channel.eq(entering.channel),
        ]
        for r in range(self.config.rows):
            m.submodules[f"row_{r}"] = row = Row(self.config, r)
            m.d.comb += [
                row.write.eq(self.write),
                row.mode.eq(self.layer.mode),
                row.variant.eq(self.layer.variant),
                row.control.eq(row_control),
                array.activation[r].eq(row.word),
                array.first[r].eq(row.first),
            ]
            row_control = row.control_out
        for c in range(self.config.columns):
            m.submodules[f"weights_{c}"] = edge = WeightEdge(self.config, c)
            m.d.comb += [
                edge.write.eq(self.write),
                edge.mode.eq(self.layer.mode),
                edge.control.eq(weight_control),
                array.weight[c].eq(edge.word),
            ]
            weight_control = edge.control_out

    def _drain(self, m: Module, array: Array, leaving: Sequencer) -> None:
        """Output edges, each a cycle after its neighbour, and the end of the layer."""
        control = Signal(SUM_CONTROL)
        for name in ("valid", "k_first", "k_last", "last", "step", "channel", "output"):
            m.d.comb += control[name].eq(getattr(leaving, name))
        for c in range(self.config.columns):
            m.submodules[f"output_{c}"] = edge = OutputEdge(self.config, c, self.shared)
            m.d.comb += [
                edge.write.eq(self.write),
                edge.output.eq(self.layer.output),
                edge.control.eq(control),
                edge.lanes.eq(array.sums[c]),
                self.valid[c].eq(edge.valid),
                self.address[c].eq(edge.address),
                self.codes[c].eq(edge.codes),
            ]
            control = edge.control_out
        with m.If(self.start):
            m.d.sync += [self.busy.eq(1), self.cycles.eq(1)]
        with m.Elif(edge.last):
            m.d.sync += self.busy.eq(0)
        with m.Elif(self.busy):
            m.d.sync += self.cycles.eq(self.cycles + 1)
