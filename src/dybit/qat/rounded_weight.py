"""The weight of a layer in training as others read it: rounded values, whose writes go to the trained parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

_PARAMETERS_OWN = ("data", "grad", "requires_grad")
_GETTERS = {getattr(Tensor, name).__get__: name for name in _PARAMETERS_OWN if name != "requires_grad"}
_SETTERS = {getattr(Tensor, name).__set__: name for name in _PARAMETERS_OWN}
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}


class RoundedWeight(Tensor):
    """The rounded weight of a layer in training, or a view of it; made by :meth:`of`.

    It computes as the rounded values, with their gradients. What is written to it, in place, by an initializer or as
    ``weight.data = values``, is written to the parameter. ``data`` and ``grad`` are the parameter's, which is in
    floating point.
    """

    _trained: Tensor

    @classmethod
    def of(cls, rounded: Tensor, trained: Tensor) -> RoundedWeight:
        """Makes the weight.

        Args:
            rounded: The rounded values.
            trained: What is rounded, of the same shape.
        """
        made = rounded.as_subclass(cls)
        made._trained = trained
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Computes with the rounded values, or writes to the parameter."""
        kwargs = kwargs or {}
        weight = args[0] if args and isinstance(args[0], RoundedWeight) else None
        if weight is not None and func in _GETTERS:
            return getattr(weight._trained, _GETTERS[func])
        if weight is not None and func in _SETTERS:
            return setattr(weight._trained, _SETTERS[func], args[1])
        with torch._C.DisableTorchFunctionSubclass():
            if weight is not None and _writes(func):
                result = func(weight._trained, *args[1:], **kwargs)
                return weight if result is weight._trained else result
            for name in ("out", "tensor"):  # where functions write to, and initializers
                if isinstance(target := kwargs.get(name), RoundedWeight) and (name == "out" or _writes(func)):
                    func(*args, **kwargs | {name: target._trained})
                    return target
            result = func(*args, **kwargs)
            if weight is None or type(result) is not Tensor or not _same_memory(result, weight):
                return result
            # A view of the values: writes to it belong into the same view of the parameter.
            with torch.no_grad():
                return RoundedWeight.of(result, cast(Tensor, func(weight._trained, *args[1:], **kwargs)))


def _writes(func: Callable[..., Any]) -> bool:
    """Whether a function writes to its first argument, by its name."""
    name = func.__name__
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name in _IN_PLACE


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share their memory; not of tensors without any, as in tracing."""
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False
