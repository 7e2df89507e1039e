"""Parts that a design has many of: written once in Verilog and referred to, where Amaranth would repeat their text."""

from __future__ import annotations

from collections.abc import Callable

from amaranth.hdl import ClockSignal, Instance, Module, ResetSignal, Value
from amaranth.lib import wiring


class Shared:
    """Collects the parts that a design refers to.

    Args:
        prefix: What the names of their modules begin with.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.parts: dict[str, wiring.Component] = {}


def place(m: Module, name: str, make: Callable[[], wiring.Component], kind: str, shared: Shared | None):
    """Adds a part to a module and returns its interface.

    Args:
        m: The module.
        name: Name of the part in it.
        make: Creates the part; it must have registers, since it is given a clock.
        kind: Name under which equal parts are shared.
        shared: Where they are collected, or None to add the part itself.
    """
    if shared is None:
        m.submodules[name] = part = make()
        return part
    if kind not in shared.parts:
        shared.parts[kind] = make()
    signature = shared.parts[kind].signature
    interface = signature.create()
    ports = {
        f"{'i' if member.flow == wiring.In else 'o'}_{'__'.join(map(str, path))}": Value.cast(value)
        for path, member, value in signature.flatten(interface)
    }
    module = f"{shared.prefix}_{kind}"
    m.submodules[name] = Instance(module, i_clk=ClockSignal(), i_rst=ResetSignal(), **ports)
    return interface
