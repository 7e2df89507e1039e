"""Fuses activations into the quantized linear layers before them: the kernels apply them to results in the cache.

A ``torch.fx`` trace of the parent module shows which layer an activation follows. Only the trace is used; the module
keeps running its own code.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dybit.layers.forwards import QuantizedLinear
from dybit.layers.quantized import FusedModule, Quantized, is_linear
from dybit.operators.activations import activate
from dybit.runtime.trace import Tracer, is_bare

# Names of dybit.operators.activations by transformers' class names, since importing transformers is slow.
_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}


def name_of(module: nn.Module | None) -> str:
    """Returns the kernels' name of an activation; empty if they do not have it."""
    cls = type(module)
    if cls is nn.GELU:
        return "gelu" if cast(nn.GELU, module).approximate == "none" else "gelu_tanh"
    if cls in (nn.ReLU, nn.SiLU):
        return "relu" if cls is nn.ReLU else "silu"
    return _TRANSFORMERS.get(cls.__name__, "") if cls.__module__ == "transformers.activations" else ""


class FusedLinear(FusedModule):
    """A quantized linear layer and the activation after it.

    The two run one after the other if gradients are recorded, under ``torch.compile`` and ``torch.export``, and for
    inputs that the kernels do not support, such as half precision, and if one has got hooks or another forward. Other
    attributes are those of the layer.

    Args:
        layer: The quantized layer. It is shared, not copied.
        activation: One of :data:`dybit.operators.activations.ACTIVATIONS`.
        module: The module of the activation, or None. It is shared, and called only if it has got hooks.
    """

    def __init__(self, layer: Quantized, activation: str, module: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation
        self._module = (module,)  # not registered: it stays in its own place, as an identity

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        layer = self._modules["layer"]
        if not self.activation_is_bare():
            return cast(Tensor, cast(nn.Module, self._module[0])(self.layer(x)))
        if not torch.compiler.is_compiling() and isinstance(layer, QuantizedLinear) and is_bare(layer):
            return layer.multiply(x, self.activation)
        return activate(self.layer(x), self.activation)

    def activation_is_bare(self) -> bool:
        """Whether the activation has no hooks and no forward of its own."""
        return self._module[0] is None or is_bare(self._module[0])

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # as nn.Module
        """Returns an attribute of the layer, which the model may read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def extra_repr(self) -> str:
        """The activation after the layer."""
        return f"activation={self.activation}"


class _Tracer(Tracer):
    """Treats layers and activations as leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Quantized) or bool(name_of(m)) or super().is_leaf_module(m, module_qualified_name)


def fuse_activations(model: nn.Module) -> tuple[nn.Module, int]:
    """Fuses every quantized linear layer whose only user is an activation in the same parent module.

    Modules that ``torch.fx`` cannot trace are not changed.

    Args:
        model: It is not changed.

    Returns:
        The fused model and the number of fused layers. Modules that contain fused layers are copies, all others are
        shared. If nothing is fused, ``model`` itself.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    fused = _replace(model, replaced)
    return fused, sum(isinstance(module, FusedLinear) for module in fused.modules())


def _replace(module: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    """Returns a module with its layers fused, or the module itself. ``replaced`` maps modules seen before."""
    if module not in replaced and not isinstance(module, Quantized):
        changed = _fused_children(module)
        for name, child in module.named_children():
            if name not in changed and (new := _replace(child, replaced)) is not child:
                changed[name] = new
        replaced[module] = module
        if changed:
            replaced[module] = copied = copy.copy(module)
            copied._modules = {**module._modules, **changed}
    return replaced.get(module, module)


def _fused_children(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the fused layers, and identities in place of their activations, by the names of children."""
    children = dict(module.named_children())
    layers = {name for name, child in children.items() if isinstance(child, Quantized) and is_linear(child)}
    activations = {name: known for name, child in children.items() if is_bare(child) and (known := name_of(child))}
    if not layers or not activations or "forward" in vars(module):
        return {}
    try:
        nodes = _Tracer().trace(module).nodes
    except Exception:  # tracing runs the module's own code on proxies, which can raise any exception
        return {}
    calls: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    pairs: dict[str, str] = {}
    for name in layers & calls.keys():
        users = {str(user.target) if user.op == "call_module" else "" for node in calls[name] for user in node.users}
        alone = all(len(node.users) == 1 for node in calls[name])
        if alone and len(users) == 1 and (user := users.pop()) in activations:
            pairs[name] = user
    # an activation that is also used elsewhere is not fused
    for name in set(pairs.values()):
        if any(str(source.target) not in pairs for node in calls[name] for source in node.all_input_nodes):
            pairs = {layer: user for layer, user in pairs.items() if user != name}
    fused: dict[str, nn.Module] = {
        layer: FusedLinear(cast(Quantized, children[layer]), activations[user], children[user])
        for layer, user in pairs.items()
    }
    return {**fused, **{user: _identity(children[user]) for user in pairs.values()}}


def _identity(module: nn.Module) -> nn.Module:
    """Returns an identity with the attributes of a module, which the model may read."""
    made = nn.Identity()
    vars(made).update({name: value for name, value in vars(module).items() if name not in vars(made)})
    return made.train(module.training)
