"""Layers whose tensors accelerate moves: to another device, or to the CPU or the disk between their calls.

Accelerate takes the names of a module's parameters and buffers, reads each tensor as an attribute of that name, and
puts the moved tensor into the tables of the module. The attribute of a weight has its values, the buffer of the same
name its codes. So code of accelerate is given the codes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

WEIGHT_NORM = "torch.nn.utils.weight_norm"


def read_by_accelerate(depth: int) -> bool:
    """Whether code of accelerate asks.

    Args:
        depth: How many calls lie between that code and the caller of this function.
    """
    return module_that_reads(depth + 1).partition(".")[0] == "accelerate"


def module_that_reads(depth: int) -> str:
    """Returns the name of the Python module whose code asks; see :func:`read_by_accelerate`."""
    return str(sys._getframe(depth + 2).f_globals.get("__name__", ""))


def is_offloaded(module: nn.Module) -> bool:
    """Whether the buffers of a module are in memory during its calls only."""
    return any(hook.offload and hook.offload_buffers for hook in offloading_hooks(module))


def offloading_hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate on a module that know where its tensors are."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if hasattr(one, "weights_map"):
            yield one


def moves_only(module: nn.Module) -> bool:
    """Whether the forward that is set on a module is accelerate's, which moves tensors and computes nothing."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return hook is not None and all(type(one).__module__.partition(".")[0] == "accelerate" for one in hooks)


def held_tensor(module: nn.Module, name: str) -> Tensor:
    """Returns a buffer of a module; where it is offloaded, as it is kept between calls."""
    tensor = module._buffers[name]
    assert tensor is not None  # for type checkers
    if tensor.is_meta:
        for hook in offloading_hooks(module):
            if hook.weights_map is not None and name in hook.weights_map:
                kept: Tensor = hook.weights_map[name]
                return kept
    return tensor
