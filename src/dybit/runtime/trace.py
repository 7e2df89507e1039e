"""A ``torch.fx`` tracer that keeps writes in place.

``torch.fx`` itself records ``y += 1`` as ``y = y + 1``, which leaves other names of the same tensor unchanged, and
refuses ``y[0] = 1``.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.fx.proxy import Attribute

from dybit.layers.patched_forward import has_hooks

# The operators of augmented assignments.
AUGMENTED = (
    "add",
    "and",
    "floordiv",
    "lshift",
    "mod",
    "mul",
    "matmul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
)


def augment(value: Any, other: Any, name: str) -> Any:  # noqa: ANN401  # a tensor or a number
    """Computes an augmented assignment, such as ``value += other``, and returns the new value.

    ``torch.fx`` writes calls of ``operator.iadd`` as assignments to ``value``, which is wrong for numbers that have
    another name.

    Args:
        value: Is changed in place if it is a tensor.
        other: The right-hand side.
        name: The function of :mod:`operator`, such as ``iadd``.
    """
    return getattr(operator, name)(value, other)


def is_bare(layer: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class and nothing else: no hooks, no replaced forward."""
    return not (has_hooks(layer) or "forward" in vars(layer))


def called(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """Returns the module that a node calls, or None."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


class _Value(fx.Proxy):
    """A value in a trace."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        if name in ("tracer", "node", "root", "attr", "_node"):  # of torch.fx
            object.__setattr__(self, name, value)
        else:
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})

    def __setitem__(self, index: Any, value: Any) -> None:  # noqa: ANN401
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Attribute(_Value, Attribute):
    """An attribute of a value, such as ``x.data``, or a method."""


def _augmented(name: str) -> Any:  # noqa: ANN401
    def method(self: _Value, other: Any) -> fx.Proxy:  # noqa: ANN401
        return self.tracer.create_proxy("call_function", augment, (self, other, name), {})

    return method


for _name in AUGMENTED:
    setattr(_Value, f"__i{_name}__", _augmented(f"i{_name}"))


class Tracer(fx.Tracer):
    """Records augmented assignments, assignments to items and to attributes. Modules with hooks are leaves.

    Attributes:
        entered: The modules whose calls are not in the graph, since their own calls are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[nn.Module] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Returns the value of a node."""
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the call of a module becomes one node."""
        return not is_bare(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """As ``torch.fx``."""
        if not self.is_leaf_module(m, self.path_of_module(m)):
            self.entered.append(m)
        return super().call_module(m, forward, args, kwargs)
