"""Keeps a forward that was set on an instance in step with the class of the module.

Libraries such as accelerate replace ``forward`` on the instance and keep the bound method of the class. Quantizing a
module changes its class, and the kept method would still compute the old layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, cast

from torch import nn

from dybit.layers.input_spec import round_inputs


def follow_class_(module: nn.Module, before: type[nn.Module]) -> None:
    """Adapts forwards that were set on a module after its class has changed, in place.

    Bound methods of the old class's forward become those of the new class. A replaced forward that keeps no such method
    is called with rounded inputs.

    Args:
        module: The module, of its new class.
        before: Its previous class.
    """
    state = module.__dict__
    forward = state.get("forward")
    if isinstance(forward, partial) and forward.func is _call_rounded:
        forward = state["forward"] = forward.args[1]
    kept = _methods(module, before)
    for name in kept:
        state[name] = MethodType(type(module).forward, module)
    if forward is not None and not kept and hasattr(module, "round_input"):
        state["forward"] = partial(_call_rounded, module, forward)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replaces the forwards of modules, and restores them afterwards."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, old in before.items():
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after the forward of a module, or its backward."""
    state = vars(module)
    return bool(
        state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
    )


def is_replaced(module: nn.Module) -> bool:
    """Whether a module has a forward of its own that keeps no bound method of its class."""
    return "forward" in vars(module) and not _methods(module, type(module))


def _methods(module: nn.Module, cls: type[nn.Module]) -> list[str]:
    """Returns the attributes of a module that are bound methods of a class's forward."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is cls.forward
    ]


def _call_rounded(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Calls the forward of a layer with the inputs rounded."""
    args, kwargs = round_inputs(layer, args, kwargs, cast(Any, layer).round_input)
    return forward(*args, **kwargs)
