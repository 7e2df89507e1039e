"""Parts are written once and referred to, with the ports of the part itself."""

from amaranth.back import rtlil
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from dybit.rtl.shared import Shared, place


class Register(wiring.Component):
    def __init__(self):
        super().__init__({"x": In(4), "y": Out(4)})

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.y.eq(self.x)
        return m


class Chain(wiring.Component):
    def __init__(self, shared):
        self.shared = shared
        super().__init__({"x": In(4), "y": Out(4)})

    def elaborate(self, platform):
        m = Module()
        first, second = (place(m, name, Register, "register", self.shared) for name in ("first", "second"))
        m.d.comb += [first.x.eq(self.x), second.x.eq(first.y), self.y.eq(second.y)]
        return m


def test_a_shared_part_is_collected_once_and_referred_to():
    shared = Shared("top")
    text = rtlil.convert(Chain(shared), name="top")
    assert list(shared.parts) == ["register"]
    assert "$dff" in rtlil.convert(shared.parts["register"], name="top_register")
    assert text.count("cell \\top_register ") == 2 and "$dff" not in text


def test_without_sharing_every_place_has_the_part():
    text = rtlil.convert(Chain(None), name="top")
    assert "top_register" not in text and "\\first" in text and "\\second" in text
