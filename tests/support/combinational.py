"""Evaluation of combinational hardware on many inputs at once."""

import numpy as np
from amaranth.hdl import Fragment, _nir
from amaranth.hdl._ir import build_netlist


def _mask(width):
    return (1 << width) - 1


class Combinational:
    """A purely combinational component, evaluated cell by cell on NumPy vectors.

    The simulator evaluates one input at a time, some thousand a second; this walks the same elaborated netlist once
    for all of them, which is what makes exhaustive tests of the multiplier affordable.
    """

    def __init__(self, component):
        self.component = component
        ports = []
        for path, member, value in component.signature.flatten(component):
            ports.append(
                ("__".join(map(str, path)), value if not hasattr(value, "as_value") else value.as_value(), member.flow)
            )
        self.inputs = {name: value for name, value, flow in ports if flow.name == "In"}
        self.outputs = {name: value for name, value, flow in ports if flow.name == "Out"}
        named = [(name, value, None) for name, value, _ in ports]
        self.netlist = build_netlist(Fragment.get(component, None), ports=named)
        self.cells = {}

    def __call__(self, **inputs):
        self.cells = {}
        self.size = max(np.size(value) for value in inputs.values())
        self.given = {
            name: np.broadcast_to(np.asarray(value, dtype=np.int64), (self.size,)) for name, value in inputs.items()
        }
        self.starts = {}
        for name, (start, width) in self.netlist.top.ports_i.items():
            self.starts[start] = (name, width)
        result = {}
        for name, value in self.netlist.top.ports_o.items():
            raw = self._value(value)
            signal = self.outputs[name]
            if signal.shape().signed and len(value):
                raw = np.where(raw >> (len(value) - 1) & 1, raw - (1 << len(value)), raw)
            result[name] = raw
        return result

    def _value(self, nets):
        total = np.zeros(self.size, dtype=np.int64)
        at = 0
        while at < len(nets):
            net, end = nets[at], at + 1
            if net.is_const:
                total = total | (net.const << at)
                at += 1
                continue
            while end < len(nets) and not nets[end].is_const and nets[end] == net + (end - at):
                end += 1
            total = total | (self._cell(net.cell, net.bit) & _mask(end - at)) << at
            at = end
        return total

    def _cell(self, index, bit):
        if index == 0:
            start = max(s for s in self.starts if s <= bit)
            name, width = self.starts[start]
            return (self.given[name] & _mask(width)) >> (bit - start)
        if index not in self.cells:
            self.cells[index] = self._evaluate(self.netlist.cells[index])
        return self.cells[index] >> bit

    def _evaluate(self, cell):
        match cell:
            case _nir.Operator():
                return self._operator(cell)
            case _nir.Part():
                value, offset = self._value(cell.value), self._value(cell.offset)
                if cell.value_signed:
                    value = self._signed(value, len(cell.value))
                return value >> np.minimum(offset * cell.stride, 63) & _mask(cell.width)
            case _nir.Matches():
                value = self._value(cell.value)
                hit = np.zeros(self.size, dtype=bool)
                for pattern in cell.patterns:
                    care = int(pattern.replace("0", "1").replace("-", "0") or "0", 2)
                    hit |= (value & care) == int(pattern.replace("-", "0") or "0", 2)
                return hit.astype(np.int64)
            case _nir.PriorityMatch():
                inputs = self._value(cell.inputs)
                return np.where(self._value(_nir.Value(cell.en)), inputs & -inputs, 0)
            case _nir.AssignmentList():
                total = self._value(cell.default)
                for item in cell.assignments:
                    width = len(item.value)
                    changed = total & ~(_mask(width) << item.start) | self._value(item.value) << item.start
                    total = np.where(self._value(_nir.Value(item.cond)), changed, total)
                return total
        raise TypeError(f"{type(cell).__name__} is not combinational")

    @staticmethod
    def _signed(value, width):
        return np.where(value >> (width - 1) & 1, value - (1 << width), value)

    def _operator(self, cell):
        values = [self._value(value) for value in cell.inputs]
        widths = [len(value) for value in cell.inputs]
        a, b = values[0], values[1] if len(values) > 1 else None
        full = _mask(cell.width)
        name = cell.operator
        if name[0] == "s" and len(name) > 1:
            a = self._signed(a, widths[0])
            b = b if name == "s>>" else self._signed(b, widths[1])
        simple = {
            "~": lambda: ~a, "-": lambda: -a if b is None else a - b, "+": lambda: a + b, "*": lambda: a * b,
            "&": lambda: a & b, "|": lambda: a | b, "^": lambda: a ^ b, "b": lambda: a != 0, "r|": lambda: a != 0,
            "r&": lambda: a == _mask(widths[0]), "==": lambda: a == b, "!=": lambda: a != b,
            "<<": lambda: np.where(b < 63, a << np.minimum(b, 62), 0), "u>>": lambda: a >> np.minimum(b, 63),
            "s>>": lambda: a >> np.minimum(b, 63), "u<": lambda: a < b, "s<": lambda: a < b, "u>": lambda: a > b,
            "s>": lambda: a > b, "u<=": lambda: a <= b, "s<=": lambda: a <= b, "u>=": lambda: a >= b,
            "s>=": lambda: a >= b, "m": lambda: np.where(a, b, values[2]),
        }  # fmt: skip
        return simple[name]().astype(np.int64) & full
