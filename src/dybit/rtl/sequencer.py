"""The controller in hardware: counts through a layer fold by fold and makes the addresses of every cycle.

It is used twice, once for what enters the array and once for what leaves it.
"""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.data import StructLayout
from amaranth.lib.wiring import In, Out

COUNT_BITS = 24
# Sizes of a layer: rows in all, rows of a tile, folds along K and N, and passes (groups that run one after another).
SIZES = StructLayout({name: COUNT_BITS for name in ("rows", "tile", "k_folds", "n_folds", "passes")})
_BASES = ("activation", "weight", "channel", "output")


class Sequencer(wiring.Component):
    """Steps through passes, row tiles, output-channel folds and K folds, the last innermost.

    A fold lasts as long as its rows take to enter, but no less than its weights take, one row of the array a cycle.
    The memories are laid out so that every base address only ever grows by one amount or returns to where a pass
    began: activations by (pass, K fold, row), weights by (pass, N fold, K fold, array row), parameters of output
    channels by (pass, N fold), outputs by (pass, N fold, row).

    Args:
        array_rows: Rows of the array.

    Members:
        start: Begins a layer; ``sizes`` must be constant until ``last`` has been seen.
        sizes: View of ``SIZES``.
        valid: A row of the input enters in this cycle.
        first: It is the first of a fold.
        k_first, k_last: The fold is the first, the last along K.
        last: It is the last row of the layer.
        step: Row within the tile: the address of its partial sum.
        activation, weight, channel, output: Addresses.
    """

    def __init__(self, array_rows: int) -> None:
        self.array_rows = array_rows
        flags = {name: Out(1) for name in ("valid", "first", "k_first", "k_last", "last")}
        addresses = {name: Out(COUNT_BITS) for name in ("step", *_BASES)}
        super().__init__({"start": In(1), "sizes": In(SIZES), **flags, **addresses})

    def elaborate(self, platform) -> Module:
        """Nested counters, and bases that follow them without multiplying."""
        m = Module()
        sizes = self.sizes
        active, k, n, tile_base, turn = Signal(), *(Signal(COUNT_BITS, name=x) for x in ("k", "n", "tile_base", "turn"))
        base = {name: Signal(COUNT_BITS, name=f"{name}_base") for name in _BASES}
        begin = {name: Signal(COUNT_BITS, name=f"{name}_begin") for name in _BASES}  # of this pass
        left, rows, period = Signal(COUNT_BITS), Signal(COUNT_BITS), Signal(COUNT_BITS)
        m.d.comb += [
            left.eq(sizes.rows - tile_base),
            rows.eq(Mux(left > sizes.tile, sizes.tile, left)),
            period.eq(Mux(rows > self.array_rows, rows, self.array_rows)),
            self.valid.eq(active & (self.step < rows)),
            self.first.eq(active & (self.step == 0)),
            self.k_first.eq(k == 0),
            self.k_last.eq(k == sizes.k_folds - 1),
            self.activation.eq(base["activation"] + tile_base + self.step),
            self.weight.eq(base["weight"] + self.step),
            self.channel.eq(base["channel"]),
            self.output.eq(base["output"] + tile_base + self.step),
        ]
        n_last, tile_last, turn_last = n == sizes.n_folds - 1, left <= sizes.tile, turn == sizes.passes - 1
        grow = {"activation": sizes.rows, "weight": self.array_rows, "channel": 1, "output": sizes.rows}
        end = self.k_last & n_last & tile_last & turn_last
        m.d.comb += self.last.eq(self.valid & end & (self.step == rows - 1))
        with m.If(active & (self.step == period - 1)):
            m.d.sync += self.step.eq(0)
            m.d.sync += [base[name].eq(base[name] + grow[name]) for name in ("activation", "weight")]
            m.d.sync += k.eq(k + 1)
            with m.If(self.k_last):
                m.d.sync += [k.eq(0), n.eq(n + 1), base["activation"].eq(begin["activation"])]
                m.d.sync += [base[name].eq(base[name] + grow[name]) for name in ("channel", "output")]
                with m.If(n_last):
                    m.d.sync += [n.eq(0), tile_base.eq(tile_base + sizes.tile)]
                    m.d.sync += [base[name].eq(begin[name]) for name in _BASES]
                    with m.If(tile_last):
                        m.d.sync += [tile_base.eq(0), turn.eq(turn + 1)]
                        for name in _BASES:
                            m.d.sync += [side[name].eq(base[name] + grow[name]) for side in (base, begin)]
                        with m.If(turn_last):
                            m.d.sync += active.eq(0)
        with m.Elif(active):
            m.d.sync += self.step.eq(self.step + 1)
        with m.If(self.start):
            m.d.sync += [active.eq(1), self.step.eq(0), k.eq(0), n.eq(0), tile_base.eq(0), turn.eq(0)]
            m.d.sync += [side[name].eq(0) for side in (base, begin) for name in _BASES]
        return m
