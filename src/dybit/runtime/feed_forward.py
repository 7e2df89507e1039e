"""Fuses feed-forward blocks of transformers: linear layers with an activation between them become one kernel call.

It starts from the layers that ``activations`` has fused. A ``torch.fx`` trace shows which layer follows which; modules
keep running their own code.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dybit.layers.forwards import QuantizedLinear
from dybit.layers.quantized import FusedModule, Quantized, is_linear
from dybit.operators.prepared_linear import feed_forward
from dybit.runtime.activations import FusedLinear
from dybit.runtime.trace import Tracer, called, is_bare

_PRODUCTS = (operator.mul, torch.mul, "mul")
_LEAVES = (Quantized, FusedLinear)


class FeedForward(FusedModule):
    """``down(first(x))``, or ``down(first(x) · second(x))``, a few hundred rows at a time.

    The layers run one after the other if gradients are recorded, under ``torch.compile`` and ``torch.export``, and for
    inputs that the kernels do not support.

    Args:
        first: A quantized layer with the activation after it. All layers are shared, not copied.
        down: The last quantized layer.
        second: A quantized layer for the factor, or None.
    """

    second: nn.Module | None

    def __init__(self, first: FusedLinear, down: Quantized, second: Quantized | None = None) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.register_module("second", second)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features of the last layer)."""
        parts = self._modules  # bypasses nn.Module's attribute lookup, which is slow compared with a single row
        first, second = cast(FusedLinear, parts["first"]), parts["second"]
        layers = (first._modules["layer"], parts["down"], *((second,) if second is not None else ()))
        bare = first.activation_is_bare() and all(isinstance(x, QuantizedLinear) and is_bare(x) for x in layers)
        if torch.compiler.is_compiling() or not bare:
            hidden = self.first(x)
            return cast(Tensor, self.down(hidden if second is None else hidden * second(x)))
        prepared = [cast(QuantizedLinear, layer).prepared() for layer in layers]
        return feed_forward(x, prepared[0], prepared[1], prepared[2] if len(prepared) > 2 else None, first.activation)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # as nn.Module
        """Returns an attribute of the first layer, which the model may read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("first"), name)


class _Absorbed(nn.Identity):
    """Takes the place of a layer that :class:`FeedForward` computes. Other attributes are those of that layer.

    Args:
        module: It is shared, and never called.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # not registered: its parameters are those of the other one

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # as nn.Module
        """Returns an attribute of the module, which the model may read."""
        if name.startswith("_"):  # before the module is set, as in a copy
            raise AttributeError(name)
        return getattr(self._module[0], name)


class _Tracer(Tracer):
    """Enters only modules that contain layers and can be traced on their own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name) or not any(isinstance(x, _LEAVES) for x in m.modules()):
            return True
        return isinstance(m, (*_LEAVES, FeedForward)) or _trace(m) is None

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:  # noqa: ANN401
        """Traces the forward without its decorators, which pass on arguments in ways that proxies do not support."""
        return super().create_args_for_root(inspect.unwrap(root_fn), is_module, concrete_args)

    def keys(self, obj: fx.Proxy) -> Any:  # noqa: ANN401  # as fx
        """Returns no keys: keyword arguments that are only passed on need not be known."""
        return iter(())


def _trace(module: nn.Module) -> fx.Graph | None:
    """Returns the traced calls of a module, or None if it cannot be traced."""
    try:
        return _Tracer().trace(module)
    except Exception:  # tracing runs the module's own code on proxies, which can raise any exception
        return None


def fuse_feed_forward(model: nn.Module) -> nn.Module:
    """Replaces chains of layers, whose results go only to the next layer, by :class:`FeedForward`.

    A chain of two layers may span different modules, as in BERT. A chain of three, as in Llama, must be all that one
    module computes; the module is replaced as a whole.

    Args:
        model: A model after :func:`dybit.runtime.activations.fuse_activations`. It is not changed.

    Returns:
        The fused model. Modules that contain fused layers are copies, all others are shared. If nothing is fused,
        ``model`` itself.
    """
    return _Fusion().visit(model)


class _Fusion:
    """One pass over a model."""

    def __init__(self) -> None:
        self._replaced: dict[nn.Module, nn.Module] = {}
        self._open: set[nn.Module] = set()  # modules that return the result of a layer with its activation

    def visit(self, module: nn.Module) -> nn.Module:
        """Returns the module that replaces another."""
        if isinstance(module, _LEAVES):
            return module
        if module not in self._replaced:
            self._replaced[module] = module  # provisional, for a module that contains itself
            children = {name: self.visit(child) for name, child in module.named_children()}
            changed = {name: new for name, new in children.items() if new is not module._modules[name]}
            new = _with(module, changed) if changed else module
            if any(isinstance(child, FusedLinear) or child in self._open for child in children.values()):
                new = self._fuse(new)
            self._replaced[module] = new
        return self._replaced[module]

    def _fuse(self, module: nn.Module) -> nn.Module:
        graph = None if "forward" in vars(module) else _trace(module)
        if graph is None:
            return module
        counts = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        changed: dict[str, nn.Module] = {}
        returned = False
        for node in graph.nodes:
            first = called(node, module)
            user = _user(node, module)
            if not isinstance(first, FusedLinear) or user is None or counts[str(node.target)] > 1:
                continue
            if user.op == "output":
                returned = True
            elif user.target in _PRODUCTS:
                whole = _gated(graph, module, node, user)
                if whole is not None:
                    return whole
            elif (down := _linear(user, module)) is not None and counts[str(user.target)] == 1:
                changed |= {str(node.target): FeedForward(first, down), str(user.target): _Absorbed(down)}
        if (
            changed and _trace(fused := _with(module, changed)) is not None
        ):  # its code may read other attributes of the layer
            module = fused
        if returned and is_bare(module):
            self._open.add(module)
        return module


def _gated(graph: fx.Graph, module: nn.Module, node: fx.Node, product: fx.Node) -> FeedForward | None:
    """Returns the replacement of a module that multiplies two results and calls a last layer."""
    x, *others = node.args
    factors = [arg for arg in product.args if isinstance(arg, fx.Node)]
    sources = [_source(arg, module) for arg in factors]
    last = _user(product, module)
    plain = is_bare(module) and not hasattr(type(module).forward, "__wrapped__")
    if others or node not in sources or len(factors) != 2 or last is None or not plain:
        return None
    (other,) = (source for source in sources if source is not node) if sources[0] is not sources[1] else (node,)
    second, down, result = _linear(other, module), _linear(last, module), _user(last, module)
    if second is None or down is None or other.args != (x,) or result is None or result.op != "output":
        return None
    known = {node, other, product, last, result}
    for found in graph.nodes:
        if found.op == "placeholder":
            if found is not x and found.users:
                return None
        elif found not in known and not _is_identity(found, module):
            return None
    return FeedForward(cast(FusedLinear, called(node, module)), down, second)


def _linear(node: fx.Node, root: nn.Module) -> Quantized | None:
    """The quantized linear layer that a node calls with its only argument."""
    layer = called(node, root)
    return layer if isinstance(layer, Quantized) and is_linear(layer) and len(node.all_input_nodes) == 1 else None


def _is_identity(node: fx.Node, root: nn.Module) -> bool:
    module = called(node, root)
    if module is None or not is_bare(module):
        return False
    return type(module).forward is nn.Identity.forward or (type(module) is nn.Dropout and not module.training)


def _user(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """Returns the only user of a node, skipping identities."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if not _is_identity(node, root):
            return node
    return None


def _source(node: fx.Node, root: nn.Module) -> fx.Node:
    """Returns the origin of a value, skipping identities."""
    while _is_identity(node, root):
        node = node.all_input_nodes[0]
    return node


def _with(module: nn.Module, changed: dict[str, nn.Module]) -> nn.Module:
    """Copies a module and replaces some of its submodules."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    for name, inner in _by_child(changed):
        child = inner.pop("", None) or _with(cast(nn.Module, copied._modules[name]), inner)
        copied._modules[name] = child
    return copied


def _by_child(changed: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Groups changes by the first part of their path. An empty rest means the child itself."""
    groups: dict[str, dict[str, nn.Module]] = {}
    for path, new in changed.items():
        name, _, rest = path.partition(".")
        groups.setdefault(name, {})[rest] = new
    yield from groups.items()
