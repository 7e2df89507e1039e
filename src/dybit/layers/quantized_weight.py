"""The weight of a quantized layer as a tensor: dequantizes when values are used, and quantizes values that are written.

Many models read ``layer.weight.dtype`` or ``.device`` in their forward; this must not dequantize the weight. Code that
merges, initializes or prunes weights writes to ``layer.weight``; such writes must not be lost.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dybit.errors import DyBitError, DyBitWarning
from dybit.operators.dispatch import check_values, no_view
from dybit.operators.packed_cache import Snapshot
from dybit.tensors.encoding import requantize
from dybit.tensors.quantized_tensor import QuantizedTensor

# Answered without computing values.
_PROPERTIES = """
    device dtype grad grad_fn is_cpu is_cuda is_leaf is_meta is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse
    is_sparse_csr is_xpu itemsize layout nbytes ndim output_nr requires_grad retains_grad shape
"""
_METHODS = """
    __len__ dim element_size get_device is_complex is_conj is_contiguous is_floating_point is_inference is_neg is_signed
    ndimension nelement numel size storage_offset stride
"""
_DESCRIPTIONS: set[Callable[..., Any]] = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    torch.is_complex,
    torch.is_floating_point,
    torch.numel,
}
# Answered by a tensor without memory of the same shape, type and device.
_ALIKE: set[Callable[..., Any]] = {
    *(getattr(Tensor, f"new_{name}") for name in ("empty", "empty_strided", "full", "ones", "tensor", "zeros")),
    *(getattr(torch, f"{name}_like") for name in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")),
    Tensor.is_same_size,
    torch.is_same_size,
    torch.result_type,
}
# The same, if the weight is not the first argument.
_AS: set[Callable[..., Any]] = {Tensor.expand_as, Tensor.reshape_as, Tensor.to, Tensor.type_as, Tensor.view_as}
_TRAINED = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
_REPLACED = {Tensor.resize_, Tensor.resize_as_}
_UNCOUNTED = {Tensor.apply_, Tensor.map_, Tensor.map2_}  # writes that torch does not count
_modes = threading.local()
_T = TypeVar("_T", bound=Tensor)


@contextmanager
def plain_values() -> Iterator[None]:
    """Makes this thread read weights of quantized layers as ordinary tensors.

    Torch's fused attention accepts only ordinary tensors.
    """
    before = reads_plain_values()
    _modes.plain = True
    try:
        yield
    finally:
        _modes.plain = before


def reads_plain_values() -> bool:
    """Whether weights are read as ordinary tensors: within :func:`plain_values` and under ``torch.compile``."""
    return torch.compiler.is_compiling() or getattr(_modes, "plain", False)


class QuantizedWeight(Tensor):
    """The weight of a quantized layer, or a view of it.

    Shape, type and device are known without dequantizing; values are computed at the first operation that needs them.
    Values that are written, in place or by ``weight.data = values``, are quantized at once into the layer's codes,
    scales and choices, with a :class:`~dybit.errors.DyBitWarning` that gives the error. The weight cannot be trained.
    To copy its values to an ordinary tensor, use ``ordinary.copy_(weight)``; ``ordinary.data = weight`` does not work.

    Args:
        source: The stored weight.
        view: A view of its values; None for all.
    """

    __slots__ = ("_own",)  # torch.utils.swap_tensors refuses tensors of different slots; a swap would be lost
    _source: _Source
    _view: Tensor | None

    def __new__(cls, source: _Source, view: Tensor | None = None) -> QuantizedWeight:
        """Makes a tensor without memory."""
        packed = source.stored.packed
        if view is None:
            made = Tensor._make_wrapper_subclass(
                cls, source.stored.spec.shape, dtype=source.dtype, device=packed.device
            )
        else:
            made = Tensor._make_wrapper_subclass(
                cls, view.shape, view.stride(), view.storage_offset(), dtype=view.dtype, device=view.device
            )
        made._source, made._view = source, view
        return made

    @classmethod
    def of(cls, stored: QuantizedTensor, dtype: torch.dtype) -> QuantizedWeight:
        """The weight in a floating-point type."""
        return cls(_Source(stored, dtype))

    def set_(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Refuses ``Tensor.set_``, which parametrizations call.

        Raises:
            DyBitError: Always.
        """
        raise DyBitError(
            "the weight of a quantized layer cannot be changed by aten.set_, as parametrizations do; call dequantize_ "
            "first"
        )

    def holds(self, stored: Tensor | None) -> bool:
        """Whether this is the whole weight with the given packed codes."""
        return self._view is None and self._source.stored.packed is stored

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Answers questions about shape and type directly, and computes everything else with the values."""
        kwargs = kwargs or {}
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        weight = args[0] if args and isinstance(args[0], QuantizedWeight) else None
        if func in _ALIKE or (func in _AS and weight is None):
            return func(
                *replace_instances(QuantizedWeight, _alike, args), **replace_instances(QuantizedWeight, _alike, kwargs)
            )
        if weight is None:
            return _compute(func, args, kwargs)
        if func in (Tensor.data.__get__, Tensor.detach, torch.detach):  # type: ignore[attr-defined]
            return QuantizedWeight(weight._source, weight._view)
        if func in _TRAINED:
            return weight._refuse_training(*args[1:], **kwargs)
        if func in _REPLACED:
            raise DyBitError(f"the weight of a quantized layer cannot be changed by {func.__name__}")
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            return weight._assign(args[1])
        return _compute(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own signature lacks the function
        cls,
        func: torch._ops.OpOverload[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Computes with the values if C++ code of torch bypasses ``__torch_function__``."""
        if func._schema.is_mutable:
            raise DyBitError(f"the weight of a quantized layer cannot be changed by {func}")
        if func is torch.ops.aten.detach.default:
            return QuantizedWeight(args[0]._source, args[0]._view)
        return func(
            *replace_instances(QuantizedWeight, _values, args),
            **replace_instances(QuantizedWeight, _values, kwargs or {}),
        )

    def _refuse_training(self, requires_grad: bool = True) -> QuantizedWeight:
        if requires_grad:
            raise DyBitError(
                "the weight of a quantized layer holds codes and cannot be trained; call dequantize_ on the layer, "
                "keep it in floating point by the recipe, or take weight.clone()"
            )
        return self

    def _assign(self, values: Tensor) -> None:
        """Writes all values, as ``weight.data = values``."""
        if isinstance(values, QuantizedWeight) and values._source is self._source and values._view is self._view:
            return  # the last step of ``weight.data += …``, which has already written in place
        if tuple(values.shape) != tuple(self.shape) or self._view is not None:
            raise DyBitError(
                f"the weight of a quantized layer, of shape {tuple(self._source.stored.spec.shape)}, cannot be "
                f"replaced by a tensor of shape {tuple(values.shape)}"
            )
        with torch.no_grad():
            self.copy_(values)


class _ReadOnlyStorage(torch.UntypedStorage):
    """The memory of the values: writes to it would be lost."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        raise DyBitError("the memory of the weight of a quantized layer cannot be written to; write to the weight")

    __setitem__ = fill_ = copy_ = resize_ = _refuse


class _Source:
    """A stored weight, and its values from the first use on."""

    def __init__(self, stored: QuantizedTensor, dtype: torch.dtype) -> None:
        self.stored = stored
        self.dtype = dtype
        self._values: Tensor | None = None
        self._read_at = Snapshot({})

    def values(self) -> Tensor:
        """Returns the values, recomputed if the codes have changed."""
        parts = self.stored.parts()
        if self._values is None or not self._read_at.holds(parts):
            with torch.inference_mode(False), torch.no_grad():
                self._values, self._read_at = no_view(self.stored.dequantize(self.dtype)), Snapshot(parts)
        return self._values

    def written_version(self) -> int:
        """Returns the version of the values, which increases with every write."""
        return self.values()._version

    def store(self) -> None:
        """Quantizes the values that were written, and replaces them by the values of their codes.

        Raises:
            DyBitError: They cannot be quantized. The weight is then unchanged.
        """
        with torch.inference_mode(False), torch.no_grad():
            written, before = self._values, self.stored.dequantize(self.dtype)
            assert written is not None  # for type checkers
            if written.requires_grad:  # by what was added to it
                written.detach_()
            if torch.equal(written, before):
                return
            try:
                new = requantize(self.stored, written)
            except DyBitError:
                written.copy_(before)
                raise
            wanted = written.double()
            for suffix, part in new.buffers().items():
                self.stored.buffers()[suffix].copy_(part)
            written.copy_(self.stored.dequantize(self.dtype))
            self._read_at = Snapshot(self.stored.parts())
            error = float((written.double() - wanted).norm() / wanted.norm().clamp(min=1e-300))
        warnings.warn(
            "the weight of a quantized layer was written to; its new values are quantized, with a relative error of "
            f"{error:.2g}",
            DyBitWarning,
            stacklevel=4,  # the caller of the function
        )


def _compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Calls a function with values in place of weights, and stores the values that it has written."""
    weights: list[QuantizedWeight] = []

    def read(x: QuantizedWeight) -> Tensor:
        weights.append(x)
        return _values(x)

    others = [x for x in (*args, *kwargs.values()) if type(x) in (Tensor, torch.nn.Parameter) and x.ndim]
    args, kwargs = replace_instances(QuantizedWeight, read, args), replace_instances(QuantizedWeight, read, kwargs)
    for weight in weights:
        check_values(weight._source.stored.packed, *others)
    before = [weight._source.written_version() for weight in weights]
    result = func(*args, **kwargs)
    # In inference mode, tensors have no version counter.
    by_name = func in _UNCOUNTED or (torch.is_inference_mode_enabled() and _writes(func, kwargs))
    for weight, version in zip(weights, before, strict=True):
        if by_name or weight._source.written_version() != version:
            weight._source.store()
    return _guard(result, weights)


def _writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function writes to its arguments, by its name."""
    name = func.__name__
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or name.startswith("__i") or bool(kwargs.get("out") is not None)


def _guard(result: Any, weights: list[QuantizedWeight]) -> Any:  # noqa: ANN401
    """Wraps views of the values in a result as weights, so that writes to them are noticed."""
    if isinstance(result, tuple | list):
        parts = [_guard(part, weights) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    if type(result) is torch.UntypedStorage:
        result.__class__ = _ReadOnlyStorage
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
    if type(result) is not Tensor:
        return result
    for weight in weights:
        if result is _values(weight):
            return weight
        if _shares_memory(result, weight._source.values()):
            return QuantizedWeight(weight._source, result)
    return result


def _shares_memory(x: Tensor, values: Tensor) -> bool:
    try:
        return x.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor without memory
        return False


def _values(weight: QuantizedWeight) -> Tensor:
    return weight._source.values() if weight._view is None else weight._view


def _alike(weight: QuantizedWeight) -> Tensor:
    """Returns a tensor without memory of its shape, type and device."""
    return torch.empty(1, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def replace_instances(kind: type[_T], change: Callable[[_T], Tensor], tree: Any) -> Any:  # noqa: ANN401
    """Applies a function to the tensors of a class among arguments, also within lists, tuples and dictionaries."""
    if isinstance(tree, kind):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)(replace_instances(kind, change, part) for part in tree)
    if type(tree) is dict:
        return {key: replace_instances(kind, change, part) for key, part in tree.items()}
    return tree
