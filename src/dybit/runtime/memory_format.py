"""Memory formats of fused convolutions, which compute channels-last, where other code can tell the difference."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx, nn

from dybit.layers.forwards import QuantizedLinear
from dybit.runtime.activations import FusedLinear
from dybit.runtime.aliases import Aliases, is_fresh, name_of_call
from dybit.runtime.feed_forward import FeedForward
from dybit.runtime.trace import called

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
_COPIES = ("flatten", "reshape", "contiguous", "dropout", "dropout1d", "dropout2d", "dropout3d")
_COPYING_MODULES = (nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
_MEANS = ("mean", "sum", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
_MEAN_MODULES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_LINEAR = (QuantizedLinear, FusedLinear, FeedForward, nn.Linear)
_SIZES = ("shape", "size", "dim", "ndim", "dtype", "device", "numel", "len")


def format_like(y: Tensor, x: Tensor) -> Tensor:
    """Returns the result of a chain of convolutions in the memory format that the unfused ones give.

    Args:
        y: Channels-last, of shape (batch, channels, *size).
        x: The input of the chain.
    """
    layout = _LAYOUTS.get(x.ndim)
    if layout is not None and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
        return y
    return y.contiguous()


def origin(value: fx.Node, root: nn.Module, known: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Returns the node from which a value has its memory format in the unfused model, such as the model's input.

    Args:
        value: The input of a convolution.
        root: The traced model.
        known: Origins of the results of fused convolutions.
    """
    while value.all_input_nodes and (value in known or is_fresh(value, called(value, root))):
        value = known.get(value, value.all_input_nodes[0])
    return value


def is_visible(value: fx.Node, root: nn.Module, aliases: Aliases, absorbed: Collection[fx.Node]) -> bool:
    """Whether the memory format of a value can change the results of the model, or make it fail.

    It can in ``view``, in views that are written to, in unknown code, outside of the model, and in a mean, whose order
    of sums depends on it. If the value is also used otherwise, means do not count: converting it would take longer.

    Args:
        value: The result of a convolution.
        root: The traced model.
        aliases: Of its graph.
        absorbed: The nodes that fused convolutions replace.
    """
    users = [user for user in value.users if user not in absorbed]
    if users and all(_is(user, root, _MEANS, _MEAN_MODULES) for user in users):
        return True
    found, seen = [value], {value}
    while found:
        node = found.pop()
        for user in node.users.keys() - seen:
            if user in absorbed or _is(user, root, _SIZES, _LINEAR):
                continue
            fresh = is_fresh(user, called(user, root)) and name_of_call(user) != "stride"
            copies = _is(user, root, _COPIES, _COPYING_MODULES) and not aliases.writes(user) - set(absorbed)
            if not fresh and not copies:
                return True
            seen.add(user)
            found.append(user)
    return False


def _is(node: fx.Node, root: nn.Module, names: tuple[str, ...], kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a node calls a function or method of given names, or a module of given kinds."""
    if node.op == "call_module":
        return isinstance(called(node, root), kinds)
    name = str(node.args[1]) if node.target is getattr else name_of_call(node)
    return node.op in ("call_function", "call_method") and name in names
