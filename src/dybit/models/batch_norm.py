"""Folds batch norms into the convolutions before them, so that the folded weights are quantized."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection

import torch
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_weights

from dybit.layers.offloading import moves_only
from dybit.layers.patched_forward import has_hooks
from dybit.models.preparation import make_plain_

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Tracer(fx.Tracer):
    """Treats convolutions and norms, including subclasses, as leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_CONVOLUTIONS, *_NORMS)) or super().is_leaf_module(m, module_qualified_name)


def find_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Finds the convolutions whose output is used only by a batch norm, and by no hook.

    The structure comes from symbolic tracing. If the whole model cannot be traced, its submodules are. A forward that
    was set on an instance, and hooks that see the output of the convolution or the input of the norm, prevent folding.

    Args:
        model: A model in evaluation mode.

    Returns:
        Pairs of qualified names (convolution, batch norm), in order of execution.
    """
    if not any(isinstance(module, _NORMS) for module in model.modules()):
        return []
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    pairs = _pairs_below(model, "")
    return [
        (conv, norm)
        for conv, norm in pairs
        if uses[id(model.get_submodule(conv))] == 1 and uses[id(model.get_submodule(norm))] == 1
    ]


def _pairs_below(module: nn.Module, prefix: str) -> list[tuple[str, str]]:
    if not any(isinstance(part, _NORMS) for part in module.modules()) or isinstance(module, _NORMS):
        return []
    try:
        if _has_own_forward(module):
            raise NotImplementedError("torch traces the forward of the class")
        graph = _Tracer().trace(module)
    except Exception:  # tracing runs the model's own code on proxies, which can raise any exception
        return [pair for name, part in module.named_children() for pair in _pairs_below(part, f"{prefix}{name}.")]
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        conv, norm = module.get_submodule(str(source.target)), module.get_submodule(str(node.target))
        once = calls[source.target] == 1 and calls[node.target] == 1
        if once and isinstance(conv, _CONVOLUTIONS) and isinstance(norm, _NORMS) and _folds(conv, norm):
            pairs.append((f"{prefix}{source.target}", f"{prefix}{node.target}"))
    return pairs


def _folds(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether folding keeps the result. Subclasses of torch's layers may compute more, so they are tried out."""
    assert isinstance(conv, _CONVOLUTIONS) and isinstance(norm, _NORMS)
    if norm.training or norm.running_mean is None or type(norm).forward is not nn.BatchNorm2d.forward:
        return False  # a norm that uses batch statistics or includes an activation
    if _has_own_forward(conv) or _has_own_forward(norm) or conv._forward_hooks or has_hooks(norm):
        return False  # what lies between them would see other values, and what is on the norm would vanish with it
    if any(type(conv).forward is cls.forward for cls in _CONVOLUTIONS):
        return True
    parts = nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm)).double().eval()
    sizes = [d * (k - 1) + 2 * s + 1 for d, k, s in zip(conv.dilation, conv.kernel_size, conv.stride, strict=True)]
    count = math.prod((2, conv.in_channels, *sizes))
    x = torch.linspace(-1, 1, count, dtype=torch.float64, device=conv.weight.device).sin()
    x = x.view(2, conv.in_channels, *sizes)
    try:
        with torch.no_grad():
            expected = parts(x)
            fold_(parts, [("0", "1")])
            return torch.allclose(parts(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    except Exception:  # the model's own code, on an input that it may not expect
        return False


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a forward that may compute something else was set on a module."""
    return "forward" in vars(module) and not moves_only(module)


def fold_(model: nn.Module, pairs: Collection[tuple[str, str]]) -> None:
    """Folds the batch norms of pairs into their convolutions, in place, and replaces them by ``nn.Identity``."""
    for conv_name, norm_name in pairs:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        assert isinstance(conv, _CONVOLUTIONS) and isinstance(norm, _NORMS)
        assert norm.running_mean is not None and norm.running_var is not None
        make_plain_(conv, "bias")
        weight, bias = fuse_conv_bn_weights(
            conv.weight.detach(), conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight = nn.Parameter(weight.detach().to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
        conv.bias = nn.Parameter(bias.detach().to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
        remove_norm_(model, norm_name)


def is_pair(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether two modules are a convolution and a batch norm."""
    return isinstance(conv, _CONVOLUTIONS) and isinstance(norm, _NORMS)


def remove_norm_(model: nn.Module, name: str) -> None:
    """Replaces a batch norm by ``nn.Identity``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())


def expect_folded_(model: nn.Module, pairs: Collection[tuple[str, str]]) -> None:
    """Gives a fresh model the structure that :func:`fold_` makes: biases and identities. Values are loaded later."""
    for conv_name, norm_name in pairs:
        conv = model.get_submodule(conv_name)
        assert isinstance(conv, _CONVOLUTIONS)
        make_plain_(conv, "bias")
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
        remove_norm_(model, norm_name)
