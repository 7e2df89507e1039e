"""Which values of a traced graph may share memory, and which nodes may write to it.

Both answers are cautious: a node is taken to return a view of its inputs unless it is known to compute a new tensor,
and to write to them unless it is known not to.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dybit.layers.forwards import QuantizedLinear, is_convolution
from dybit.runtime.activations import FusedLinear
from dybit.runtime.feed_forward import FeedForward
from dybit.runtime.trace import AUGMENTED, augment, called, is_bare

_KNOWN = (torch, functional, operator, math, torch.linalg, torch.fft, torch.special, torch._C._nn)
# fmt: off
_FRESH = {
    "abs", "add", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "amin", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "batch_norm", "bmm", "cat", "celu", "clamp", "clamp_max", "clamp_min", "clip", "clone", "concat", "conv1d",
    "conv2d", "conv3d", "div", "elu", "exp", "gelu", "group_norm", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "layer_norm", "leaky_relu", "linear", "log", "log_softmax", "logsigmoid", "matmul", "max_pool1d",
    "max_pool2d", "max_pool3d", "maximum", "mean", "minimum", "mish", "mm", "mul", "neg", "pad", "prelu", "relu",
    "relu6", "rsqrt", "selu", "sigmoid", "silu", "softmax", "softplus", "softsign", "sqrt", "square", "stack", "sub",
    "tanh", "threshold", "truediv"
}
_NUMBERS = {
    "device", "dim", "dtype", "is_floating_point", "itemsize", "layout", "len", "ndim", "ndimension", "nelement",
    "numel", "requires_grad", "shape", "size", "stride"
}
_AUGMENTED = {"iconcat", *(f"i{name}" for name in AUGMENTED)}
# fmt: on
_FRESH_MODULES = tuple(f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "conv", "pooling", "padding"))


class Aliases:
    """The values of a graph that may share memory, and the writes to them.

    All inputs and attributes of the model count as one, since a caller may pass the same tensor twice.

    Args:
        module: The traced model. Its nodes keep their order while the result is in use.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self.order: dict[fx.Node, int] = {node: i for i, node in enumerate(module.graph.nodes)}
        self._parents: dict[fx.Node, fx.Node] = {node: node for node in self.order}
        self._outside: fx.Node | None = None
        written: list[tuple[fx.Node, fx.Node]] = []
        for node in self.order:
            for source in self._sources(node):
                self._parents[self._root(node)] = self._root(source)
            written += ((node, value) for value in _written(node, called(node, module)))
        self._writes: dict[fx.Node, set[fx.Node]] = {}
        for node, value in written:
            self._writes.setdefault(self._root(value), set()).add(node)

    def _sources(self, node: fx.Node) -> Iterable[fx.Node]:
        """Returns the nodes whose memory the value of a node may share."""
        if node.op in ("placeholder", "get_attr"):
            before, self._outside = self._outside, node
            return [before] if before is not None else []
        if node.op == "output":
            return []
        module = called(node, self._module)
        if _changes_first(node, module):
            return _first(node)
        fresh = is_fresh(node, module) and not _out(node)
        return [] if fresh else node.all_input_nodes

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parents[node] is not node:
            node = self._parents[node]
        return node

    def writes(self, value: fx.Node) -> set[fx.Node]:
        """Returns the nodes that may write to the memory of a value."""
        return self._writes.get(self._root(value), set())

    def writes_outside(self) -> set[fx.Node]:
        """Returns the nodes that may write to inputs or attributes of the model."""
        return set() if self._outside is None else self.writes(self._outside)

    def holds(self, value: fx.Node, start: fx.Node, end: fx.Node, own: Iterable[fx.Node] = ()) -> bool:
        """Whether nothing writes to a value after one node, up to and including another, apart from ``own`` nodes."""
        span = range(self.order[start] + 1, self.order[end] + 1)
        return not any(self.order[node] in span for node in self.writes(value) - set(own))

    def holds_outside(self, start: fx.Node, end: fx.Node, own: Iterable[fx.Node] = ()) -> bool:
        """As :meth:`holds`, for all inputs and attributes of the model."""
        return self._outside is None or self.holds(self._outside, start, end, own)

    def is_last(self, value: fx.Node, end: fx.Node) -> bool:
        """Whether nothing reads the memory of a value after a node, except through the result of that node."""
        root = self._root(value)
        if self._outside is not None and root is self._root(self._outside):
            return False
        others = [n for n in self.order if self._root(n) is root and self.order[n] < self.order[end]]
        return all(self.order[user] <= self.order[end] for n in others for user in n.users)


def writes_first(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node may write to its first argument."""
    return any(value in _first(node) for value in _written(node, called(node, root)))


def _first(node: fx.Node) -> list[fx.Node]:
    """Returns the nodes of the first positional argument, or all inputs if there is none."""
    found: list[fx.Node] = []
    fx.map_arg(node.args[:1], found.append)
    return found or node.all_input_nodes


def name_of_call(node: fx.Node) -> str:
    """Returns the name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _out(node: fx.Node) -> list[fx.Node]:
    """Returns the nodes of the argument ``out``."""
    found: list[fx.Node] = []
    fx.map_arg(_argument(node, "out"), found.append)
    return found


def _argument(node: fx.Node, name: str) -> Any:  # noqa: ANN401
    """Returns an argument of a call by its name, or None."""
    if name in node.kwargs or node.op != "call_function":
        return node.kwargs.get(name)
    try:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        return signature.bind_partial(*node.args, **node.kwargs).arguments.get(name)
    except (TypeError, ValueError):  # functions in C have no signature
        return None


def _changes_first(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node changes its first argument in place, and nothing else."""
    name = name_of_call(node)
    if node.op == "call_module":
        return module is not None and is_bare(module) and bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        in_place = name == "__setitem__" or (name.startswith("__i") and name.strip("_") in _AUGMENTED)
        return in_place or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function" or not _is_known(node):
        return False
    in_place = node.target in (augment, operator.setitem) or (name in _AUGMENTED and hasattr(operator, name))
    return in_place or name.endswith("_") or bool(_argument(node, "inplace"))


def _is_known(node: fx.Node) -> bool:
    """Whether a function is one of torch or of Python, which write only as their names and arguments say."""
    name = name_of_call(node)
    if node.target in (getattr, augment):
        return True
    calls_others = str(getattr(node.target, "__module__", "")).startswith(("torch._higher", "torch._functorch"))
    return not calls_others and any(getattr(module, name, None) is node.target for module in _KNOWN)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module only computes a new tensor, if it does not work in place."""
    if not all(is_bare(m) for m in module.modules()):
        return False
    kind = type(module)
    own = isinstance(module, FusedLinear | FeedForward) or kind.forward is QuantizedLinear.forward
    return own or is_convolution(module) or kind is nn.Linear or kind.__module__ in _FRESH_MODULES


def is_fresh(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the result of a node shares no memory with its inputs."""
    if module is not None:
        return _is_layer(module)
    name = name_of_call(node)
    if node.target is getattr:
        return node.args[1] in _NUMBERS
    known = node.op == "call_method" or _is_known(node) or node.target is len
    return known and (name in _FRESH or name in _NUMBERS)


def _written(node: fx.Node, module: nn.Module | None) -> list[fx.Node]:
    """Returns the inputs that a node may write to."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return []
    if _changes_first(node, module):
        return _first(node)
    if module is not None:
        safe = type(module).__module__.startswith("torch.nn.") and all(is_bare(m) for m in module.modules())
        return [] if safe or _is_layer(module) else node.all_input_nodes
    if node.op == "call_method":
        safe = hasattr(Tensor, name_of_call(node)) and name_of_call(node) not in (
            "numpy",
            "__array__",
            "apply_",
            "map_",
        )
        return [] if safe else node.all_input_nodes
    return _out(node) if _is_known(node) or node.target is len else node.all_input_nodes
