"""The weight of a layer in training as others read it: rounded values, whose writes go to the trained parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.layers.quantized_weight import replace_instances

_PARAMETERS_OWN = ("data", "grad", "requires_grad")
_GETTERS = {getattr(Tensor, name).__get__: name for name in _PARAMETERS_OWN if name != "requires_grad"}
_SETTERS = {getattr(Tensor, name).__set__: name for name in _PARAMETERS_OWN}
_STORAGES = {Tensor.untyped_storage, Tensor.storage, Tensor._typed_storage}
_RESIZED = {Tensor.resize_, Tensor.resize_as_}
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}


class RoundedWeight(Tensor):
    """The rounded weight of a layer in training, or a view of it; made by :meth:`of`.

    It computes as the rounded values, with their gradients. What is written to it, in place, by an initializer or as
    ``weight.data = values``, is written to the parameter. ``data`` and ``grad`` are the parameter's, which is in
    floating point.
    """

    __slots__ = ("_own",)  # torch.utils.swap_tensors refuses tensors of different slots; a swap would be lost
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

    def set_(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Refuses ``Tensor.set_``, which parametrizations call.

        Raises:
            DyBitError: Always. The parameter keeps its memory.
        """
        raise DyBitError(
            "the weight of a layer in training cannot be given other memory or be parametrized; write its values by "
            "copy_, and parametrize before prepare_qat_"
        )

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
        if weight is not None and func in _STORAGES:  # which others write to
            return func(weight._trained, *args[1:], **kwargs)
        if weight is not None and func in _RESIZED:
            raise _refusal(func.__name__)
        if func is Tensor.__iter__:
            return iter(args[0].unbind(0))
        with torch._C.DisableTorchFunctionSubclass():
            if args and (_writes(func) or kwargs.get("inplace") is True) and _among(args[0]):
                result = func(_trained(args[0]), *args[1:], **kwargs)
                return args[0] if weight is None or result is weight._trained else result
            for name in ("out", "tensor", "input", "self"):  # where functions write to, and initializers
                if _among(target := kwargs.get(name)) and (name == "out" or _writes(func)):
                    func(*args, **kwargs | {name: _trained(target)})
                    return target
            return _compute(func, args, kwargs)


def _refusal(name: str) -> DyBitError:
    return DyBitError(f"the weight of a layer in training cannot be changed by {name}; write its values by copy_")


def _compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Calls a function that does not write with the rounded values."""
    weights = _among((args, kwargs))
    before = [_version(weight) for weight in weights]
    result = func(*args, **kwargs)
    if before != [_version(weight) for weight in weights]:
        raise _refusal(func.__name__)
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
    if not any(_same_memory(part, weight) for part in _tensors(result) for weight in weights):
        return result
    with torch.no_grad():
        written = func(*_trained(args), **_trained(kwargs))
    return _joined(result, written, weights)


def _joined(result: Any, written: Any, weights: list[RoundedWeight]) -> Any:  # noqa: ANN401
    """Returns views of the values as weights: writes to them belong into the same views of the parameter."""
    if isinstance(result, tuple | list):
        parts = [_joined(one, other, weights) for one, other in zip(result, written, strict=True)]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    if type(result) is Tensor and any(_same_memory(result, weight) for weight in weights):
        return RoundedWeight.of(result, cast(Tensor, written))
    return result


def _tensors(result: Any) -> list[Tensor]:  # noqa: ANN401
    """Returns the ordinary tensors of a result."""
    if isinstance(result, tuple | list):
        return [tensor for part in result for tensor in _tensors(part)]
    return [result] if type(result) is Tensor else []


def _among(tree: Any) -> list[RoundedWeight]:  # noqa: ANN401
    """Returns the weights among arguments, also within lists, tuples and dictionaries."""
    if isinstance(tree, RoundedWeight):
        return [tree]
    parts = tree.values() if type(tree) is dict else tree if type(tree) in (tuple, list) else ()
    return [weight for part in parts for weight in _among(part)]


def _trained(tree: Any) -> Any:  # noqa: ANN401
    """Replaces the weights among arguments by what is trained."""
    return replace_instances(RoundedWeight, lambda weight: weight._trained, tree)


def _version(weight: RoundedWeight) -> int:
    """Returns a number that increases with every write; 0 in inference mode, where torch does not count them."""
    return 0 if weight.is_inference() else weight._version


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
