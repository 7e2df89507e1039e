"""Turns modules into their quantized form and back, in place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.layers.description import check_picklable
from dybit.layers.forwards import (
    QuantizedAttention,
    QuantizedBag,
    QuantizedConv,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedRecurrent,
    QuantizedTransposed,
)
from dybit.layers.input_spec import InputSpec
from dybit.layers.kinds import CONVOLUTIONS, EXPERTS, RECURRENT, TRANSPOSED, named_conv1d, named_experts, weight_names
from dybit.layers.patched_forward import follow_class_
from dybit.layers.quantized import Quantized, original_class
from dybit.layers.recurrent import forget_weights_, list_weights_
from dybit.operators.packed_cache import ordinary
from dybit.tensors.float8 import picklable, restored
from dybit.tensors.quantized_tensor import QuantizedTensor


def swap_(
    module: nn.Module,
    weights: Mapping[str, QuantizedTensor],
    input_spec: InputSpec | None = None,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
    float_dtype: torch.dtype | None = None,
) -> None:
    """Turns a module into its quantized form, in place. Give tied modules the same :class:`QuantizedTensor`.

    Args:
        module: A module for which :func:`weight_names` is not empty.
        weights: A quantized tensor for every name in :func:`weight_names`; empty to quantize only the inputs.
        input_spec: How inputs are rounded, or None.
        input_scale: For static inputs: float32 of shape (1,).
        input_offset: For static inputs with an offset: float32 of shape (1,).
        float_dtype: The type of dequantized weights; None for the type of the replaced weights.
    """
    float_dtype = float_dtype or getattr(module, weight_names(module)[0]).dtype
    before = type(module)
    module.__class__ = _quantized_class(type(module), tuple(weights))  # type: ignore[arg-type]
    forget_weights_(module)
    layer = cast(Quantized, module)
    layer.weight_specs = {name: weight.spec for name, weight in weights.items()}
    layer.input_spec = input_spec
    layer.float_dtype = float_dtype
    layer.frozen_weights = tuple(name for name, p in layer._parameters.items() if p is not None and not p.requires_grad)
    for name, weight in weights.items():
        layer._parameters.pop(name, None)  # missing if a loader has already replaced it by codes
        for suffix, buffer in weight.buffers().items():
            layer.register_buffer(name + suffix, buffer)
    if input_spec is not None and input_spec.mode == "static":
        layer.register_buffer("input_scale", input_scale)
        if input_spec.offset:
            layer.register_buffer("input_offset", input_offset)
    follow_class_(layer, before)


def set_bias_(layer: Quantized, bias: Tensor) -> None:
    """Sets the bias of a quantized linear layer or convolution to one of shape (rows,), in place. Adds it if needed."""
    old = layer._parameters.get("bias")
    if old is None:
        layer.added_bias = True
        new = bias.to(layer.get_buffer("weight_scale").device, layer.float_dtype)
        layer.register_parameter("bias", nn.Parameter(ordinary(new), requires_grad=False))
    else:
        layer.register_parameter("bias", nn.Parameter(ordinary(bias.to(old)), requires_grad=old.requires_grad))


def unswap_(layer: Quantized) -> None:
    """Turns a quantized layer back into its floating-point class, in place, with the dequantized weights."""
    weights = {name: layer.quantized_tensor(name).dequantize(layer.float_dtype) for name in layer.weight_specs}
    layer.__dict__.pop("_prepared", None)
    for name in list(weights):
        for suffix in layer.weight_specs[name].buffers():
            del layer._buffers[name + suffix]
    for name in ("input_scale", "input_offset"):
        layer._buffers.pop(name, None)
    frozen = layer.frozen_weights
    layer.__dict__.pop("frozen_weights", None)
    for attribute in ("weight_specs", "input_spec", "float_dtype"):
        delattr(layer, attribute)
    before = type(layer)
    layer.__class__ = original_class(layer)  # type: ignore[assignment]
    follow_class_(layer, before)
    for name, weight in weights.items():
        layer.register_parameter(name, nn.Parameter(weight, requires_grad=name not in frozen))
    list_weights_(layer)


@cache
def _quantized_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    mixin = Quantized
    if cls.forward is nn.Embedding.forward:
        mixin = QuantizedEmbedding
    elif names and (cls.forward is nn.Linear.forward or named_conv1d(cls)):
        mixin = QuantizedLinear
    elif names and any(_is_plainly(cls, known) for known in CONVOLUTIONS):
        mixin = QuantizedConv
    elif names and any(issubclass(cls, known) and cls.forward is known.forward for known in TRANSPOSED):
        mixin = QuantizedTransposed
    elif cls.forward is nn.MultiheadAttention.forward:
        mixin = QuantizedAttention
    elif cls.forward is nn.EmbeddingBag.forward:
        mixin = QuantizedBag
    elif issubclass(cls, RECURRENT):
        mixin = QuantizedRecurrent
    elif names and (named_experts(cls) or set(names) & set(EXPERTS)):
        mixin = QuantizedExperts

    def reader(name: str) -> property:
        return property(lambda self: self.read_weight(name))

    members: dict[str, Any] = {name: reader(name) for name in names} | {
        "__reduce_ex__": _reduce,
        "__setstate__": _set_state,
    }
    made: Any = type(f"Quantized{cls.__name__}", (mixin, cls), members)
    return cast(type[nn.Module], made)


def _is_plainly(cls: Any, known: Any) -> bool:  # noqa: ANN401
    """Whether a class is a convolution with torch's own forward."""
    return issubclass(cls, known) and cls.forward is known.forward and cls._conv_forward is known._conv_forward


def _reduce(layer: Quantized, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """Copies and pickles by the original class, since the quantized class is generated at run time."""
    if layer.weight_specs and _copied_by_peft():
        raise DyBitError(
            f"modules_to_save of PEFT has a {type(layer).__name__}, whose codes cannot be trained: call dequantize_ on "
            "the module first, or keep it in floating point by the recipe"
        )
    check_picklable(layer)
    state = {key: value for key, value in layer.__dict__.items() if key != "_prepared"}
    state["_buffers"] = {name: picklable(buffer) for name, buffer in layer._buffers.items()}
    return _rebuild, (original_class(layer), tuple(layer.weight_specs)), state


def _copied_by_peft() -> bool:
    """Whether PEFT copies the layer or a module around it, to train what parameters the copy has."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "peft.utils.other" and frame.f_code.co_name == "update":
            return True
        frame = frame.f_back
    return False


def _set_state(layer: Quantized, state: dict[str, Any]) -> None:
    """As ``nn.Module.__setstate__``."""
    buffers = {name: restored(buffer) for name, buffer in state["_buffers"].items()}
    nn.Module.__setstate__(layer, {**state, "_buffers": buffers})


def _rebuild(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """Makes an empty quantized module of a class; unpickling then sets its state."""
    quantized = _quantized_class(cls, names)  # type: ignore[arg-type]
    return quantized.__new__(quantized)
