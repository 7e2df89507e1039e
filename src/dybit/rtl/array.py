"""The systolic array in hardware: a grid of processing elements, nothing else.

Words must arrive with the skew of a wavefront.
"""

from __future__ import annotations

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from dybit.accelerator.datapath import array_lane_bits
from dybit.rtl.codec import MODE, activation_word_bits, weight_word_bits
from dybit.rtl.pe import ProcessingElement
from dybit.rtl.shared import Shared, place


class Array(wiring.Component):
    """Rows × columns of processing elements; activations go east, partial sums south, weights on a bus per column.

    Row r takes the word of one row of the input r cycles after row 0. With the first word of a fold its ``first`` is
    set, and travels east with it; wherever it passes, the PE takes its weights from the bus of its column, which must
    hold those of row r at that time. So row r's weights are needed r cycles after row 0's and no earlier, and one fold
    can follow another without a gap.

    Args:
        rows: Rows of PEs.
        columns: Columns of PEs.
        narrowest: Narrowest container: 2 or 4.
        shared: Where the element is written once and referred to, or None to have it in every place.

    Members:
        activation, first: For every row.
        weight: For every column.
        sums: For every column the packed lanes, rows + 2 cycles after row 0's activation reached that column.
        mode: View of ``MODE``, constant while a layer runs.
    """

    def __init__(self, rows: int, columns: int, narrowest: int = 2, shared: Shared | None = None) -> None:
        self.rows, self.columns, self.narrowest = rows, columns, narrowest
        self.shared = shared
        super().__init__({
            "activation": In(activation_word_bits(narrowest)).array(rows),
            "first": In(1).array(rows),
            "weight": In(weight_word_bits(narrowest)).array(columns),
            "sums": Out(sum(array_lane_bits(rows, narrowest))).array(columns),
            "mode": In(MODE),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        """Wires every PE to its neighbours."""
        m = Module()
        north = [0] * self.columns
        for r in range(self.rows):
            word, first = self.activation[r], self.first[r]
            for c in range(self.columns):
                pe = place(m, f"pe_{r}_{c}", lambda: ProcessingElement(self.rows, self.narrowest), "pe", self.shared)
                m.d.comb += [
                    pe.activation.eq(word),
                    pe.first.eq(first),
                    pe.weight.eq(self.weight[c]),
                    pe.sums.eq(north[c]),
                    pe.mode.eq(self.mode),
                ]
                word, first, north[c] = pe.activation_out, pe.first_out, pe.sums_out
        m.d.comb += [self.sums[c].eq(north[c]) for c in range(self.columns)]
        return m
