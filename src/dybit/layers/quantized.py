"""Quantized layers: any supported module, its weights held as packed codes and its inputs rounded to codes.

Must not know models, recipes or calibration.

A layer is quantized in place by changing its class to a subclass that is made for it: the module stays the same object,
in the same containers, with the same forward. What changes is that ``weight`` is a property, which dequantizes the
packed codes whenever the forward (or anybody) reads it, while the buffer of that name, and so the state dict, holds the
codes. Subclasses with a forward of their own, such as convolutions that pad first, work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.kernels.code_operators import fake_quantize
from dybit.layers.attention import attend
from dybit.layers.input_spec import InputSpec, round_dynamic, round_inputs
from dybit.layers.kinds import (
    CONVOLUTIONS,
    EXPERTS,
    expert_activation,
    expert_weights,
    named_conv1d,
    weight_names,
)
from dybit.operators.conv import conv
from dybit.operators.embedding import embedding
from dybit.operators.experts import experts, mix
from dybit.operators.linear import linear
from dybit.operators.prepared_linear import Operands, Ready
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

_SIZES = ("num_embeddings", "embedding_dim", "in_features", "out_features")


class Quantized(nn.Module):
    """Mixin of all quantized layers; :func:`swap_` makes them.

    Attributes:
        weight_specs: How each weight is stored, by its name.
        input_spec: How inputs are rounded, or None.
        float_dtype: The type in which weights are dequantized; follows ``.to(dtype)``.
        added_bias: Whether a bias was added to a layer that had none (:func:`set_bias_`).
    """

    weight_specs: dict[str, TensorSpec]
    input_spec: InputSpec | None
    float_dtype: torch.dtype
    added_bias: bool = False

    def quantized_tensor(self, name: str = "weight") -> QuantizedTensor:
        """The codes, scales and choices of a weight."""
        parts = (self._buffers.get(name + suffix) for suffix in ("", "_scale", "_choice", "_tensor_scale"))
        return QuantizedTensor(self.weight_specs[name], *parts)  # type: ignore[arg-type]

    def round_input(self, x: Tensor) -> Tensor:
        """Rounds an input to the values of its codes; returns it as it is where inputs are kept."""
        spec = self.input_spec
        if spec is None:
            return x
        if spec.mode == "static":
            return cast(Tensor, fake_quantize(x, self.input_scale, self._buffers.get("input_offset"), spec.format))
        return round_dynamic(self, x, spec)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the wrapped layer's own signature
        """Rounds the input and calls the layer's own forward."""
        if self.input_spec is None:
            return super().forward(*args, **kwargs)
        args, kwargs = round_inputs(self, args, kwargs, self.round_input)
        return super().forward(*args, **kwargs)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As ``nn.Module.register_buffer``, which would refuse the name of a property, and compute it to find out."""
        if name in self.weight_specs:
            self._buffers[name] = tensor
        else:
            super().register_buffer(name, tensor, persistent)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """As ``nn.Module.__setattr__``, but refuses values in the place of codes.

        Values that the weight has already change nothing: whoever ties weights assigns what was read from another.
        """
        if isinstance(value, Tensor) and name in self.__dict__.get("weight_specs", ()):
            spec = self.weight_specs[name]
            if (
                value.is_floating_point()
                and tuple(value.shape) == spec.shape
                and torch.equal(value, getattr(self, name))
            ):
                return
            if tuple(value.shape) != spec.packed_shape or value.dtype != torch.uint8:
                raise DyBitError(
                    f"{name} of a quantized layer cannot be replaced by a {value.dtype} of shape {tuple(value.shape)}; "
                    "call dequantize_ first"
                )
        if name in _SIZES and "weight_specs" in self.__dict__ and value != getattr(self, name):
            raise DyBitError(f"{name} of a quantized layer cannot be changed to {value!r}; call dequantize_ first")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The layer's own description and how it is quantized."""
        weights = {f"{spec.family}/{spec.group_size or spec.granularity}" for spec in self.weight_specs.values()}
        inputs = f", input={self.input_spec.format}/{self.input_spec.mode}" if self.input_spec else ""
        return f"{super().extra_repr()}, weight={'+'.join(sorted(weights))}{inputs}".lstrip(", ")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        """Moves buffers but keeps their types: scales in half precision would be other scales."""
        before = dict(self._buffers)
        self.__dict__.pop("_ready", None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Copies and pickles by the original class, since the quantized one is made at run time."""
        state = {key: value for key, value in self.__dict__.items() if key != "_ready"}
        return _rebuild, (original_class(self), tuple(self.weight_specs)), state


class _QuantizedLinear(Quantized):
    """A linear layer that multiplies by the codes, with the compiled kernels where they are."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Multiplies the only argument, whatever its name: (..., in_features) to (..., out_features)."""
        (x,) = (*args, *kwargs.values())
        if not torch.compiler.is_compiling() and (y := self.multiply(x)) is not None:
            return y
        bias = self._parameters.get("bias")
        spec, weight = self.input_spec, self.quantized_tensor()
        if spec is None:
            return linear(x, weight, bias)
        return linear(
            x,
            weight,
            bias,
            input_format=spec.format,
            input_scale=self._buffers.get("input_scale"),
            input_offset=self._buffers.get("input_offset"),
            reach=spec.reach or 1.0,
            input_group_size=spec.group_size or 0,
        )

    def multiply(self, x: Tensor, activation: str = "") -> Tensor | None:
        """What forward gives, and an activation after it, at once by the kernels; None where they cannot be asked.

        Args:
            x: (..., in_features).
            activation: One of :data:`dybit.operators.packed_weight.ACTIVATIONS`.
        """
        ready, bias, scale, offset = self.operands()
        return ready.multiply(x, bias, scale, offset, activation)

    def operands(self) -> Operands:
        """What the kernels need beside the input."""
        ready = self.__dict__.get("_ready")
        if ready is None or not ready.fits(self._buffers):
            ready = self.__dict__["_ready"] = _ready(self.quantized_tensor(), self.input_spec)
        buffers = self._buffers
        return ready, self._parameters.get("bias"), buffers.get("input_scale"), buffers.get("input_offset")


def _ready(weight: QuantizedTensor, spec: InputSpec | None) -> Ready:
    """What a linear layer keeps between its calls."""
    if spec is None:
        return Ready(weight)
    return Ready(weight, spec.format, spec.reach or 1.0, spec.group_size or 0)


class _QuantizedConv(Quantized):
    """A convolution of rounded inputs by the codes, with the compiled kernels where they are."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Convolves the only argument, whatever its name."""
        spec, layer = self.input_spec, cast(nn.Conv2d, self)
        if spec is None:
            return cast(Tensor, super().forward(*args, **kwargs))
        (x,) = (*args, *kwargs.values())
        padding = layer._reversed_padding_repeated_twice
        if layer.padding_mode != "zeros":  # the border has values of the input, so it can be rounded with it
            x = nn.functional.pad(x, padding, mode=layer.padding_mode)
            padding = [0] * len(padding)
        return conv(
            x,
            self.quantized_tensor(),
            self._parameters.get("bias"),
            stride=layer.stride,
            padding=[n for i in range(len(padding) - 2, -1, -2) for n in padding[i : i + 2]],
            dilation=layer.dilation,
            groups=layer.groups,
            input_format=spec.format,
            input_scale=self._buffers.get("input_scale"),
            input_offset=self._buffers.get("input_offset"),
            reach=spec.reach or 1.0,
        )


class _QuantizedEmbedding(Quantized):
    """An embedding that dequantizes only the rows that it looks up."""

    def forward(self, input: Tensor) -> Tensor:
        """Looks rows up: integers of any shape to (*shape, embedding_dim)."""
        return embedding(input, self.quantized_tensor()).to(self.float_dtype)


class _QuantizedAttention(Quantized):
    """Multi-head attention; where inputs are rounded, so is that of ``out_proj``, which torch's forward never calls."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As ``nn.MultiheadAttention.forward``."""
        attention = cast(nn.MultiheadAttention, self)
        if self.input_spec is None and getattr(attention.out_proj, "input_spec", None) is None:
            return nn.MultiheadAttention.forward(attention, *args, **kwargs)
        return attend(attention, *args, round_input=self.round_input, **kwargs)


class _QuantizedExperts(Quantized):
    """The experts of a mixture, all in one module: only those that are hit are multiplied, each with its rows."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' experts: (tokens, hidden), and the experts of every token with their weights."""
        spec = self.input_spec
        rounding = (spec.format, spec.reach or 1.0, spec.group_size or 0) if spec else ("", 1.0, 0)
        up, down = (self.quantized_tensor(name) for name in expert_weights(self))
        return mix(
            lambda x, expert: experts(x, expert, up, *rounding),
            expert_activation(self),
            lambda x, expert: experts(x, expert, down, *rounding),
            hidden_states,
            top_k_index,
            top_k_weights,
        )


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """The quantized layers of a model by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def is_linear(module: nn.Module) -> bool:
    """Whether a module, quantized or not, multiplies its only argument by its weight and does nothing else."""
    cls = original_class(module) if isinstance(module, Quantized) else type(module)
    return cls.forward is nn.Linear.forward or named_conv1d(cls)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a quantized convolution that rounds and convolves its only argument and does nothing else."""
    return type(module).forward is _QuantizedConv.forward


def is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a module is attention with torch's own forward, which ``attend`` can stand in for."""
    return type(module).forward is nn.MultiheadAttention.forward


def swap_(
    module: nn.Module,
    weights: Mapping[str, QuantizedTensor],
    input_spec: InputSpec | None = None,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
    float_dtype: torch.dtype | None = None,
) -> None:
    """Turns a module into its quantized form, in place; tied modules are given the same :class:`QuantizedTensor`.

    Args:
        module: A module for which :func:`weight_names` is not empty.
        weights: A quantized tensor for every name in :func:`weight_names`; empty to quantize only the inputs.
        input_spec: How inputs are rounded, or None.
        input_scale: For static inputs: float32 of shape (1,).
        input_offset: For static inputs with an offset: float32 of shape (1,).
        float_dtype: The type in which weights are dequantized; None for that of the weights that are replaced.
    """
    float_dtype = float_dtype or getattr(module, weight_names(module)[0]).dtype
    module.__class__ = _quantized_class(type(module), tuple(weights))  # type: ignore[arg-type]
    layer = cast(Quantized, module)
    layer.weight_specs = {name: weight.spec for name, weight in weights.items()}
    layer.input_spec = input_spec
    layer.float_dtype = float_dtype
    for name, weight in weights.items():
        layer._parameters.pop(name, None)  # none where a loader has put the codes in its place
        for suffix, buffer in weight.buffers().items():
            layer.register_buffer(name + suffix, buffer)
    if input_spec is not None and input_spec.mode == "static":
        layer.register_buffer("input_scale", input_scale)
        if input_spec.offset:
            layer.register_buffer("input_offset", input_offset)


def set_bias_(layer: Quantized, bias: Tensor) -> None:
    """Gives a quantized linear layer or convolution a bias of shape (rows,), in place, also where it had none."""
    old = layer._parameters.get("bias")
    if old is None:
        layer.added_bias = True
        new = bias.to(layer.get_buffer("weight_scale").device, layer.float_dtype)
        layer.register_parameter("bias", nn.Parameter(new, requires_grad=False))
    else:
        layer.register_parameter("bias", nn.Parameter(bias.to(old), requires_grad=old.requires_grad))


def unswap_(layer: Quantized) -> None:
    """Turns a quantized layer back into its floating-point class, in place, with the dequantized weights."""
    weights = {name: getattr(layer, name) for name in layer.weight_specs}
    layer.__dict__.pop("_ready", None)
    for name in list(weights):
        for suffix in layer.weight_specs[name].buffers():
            del layer._buffers[name + suffix]
    for name in ("input_scale", "input_offset"):
        layer._buffers.pop(name, None)
    for attribute in ("weight_specs", "input_spec", "float_dtype"):
        delattr(layer, attribute)
    layer.__class__ = original_class(layer)  # type: ignore[assignment]
    for name, weight in weights.items():
        layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The floating-point class of a quantized layer."""
    return next(cls for cls in type(layer).__mro__ if not issubclass(cls, Quantized) and issubclass(cls, nn.Module))


@cache
def _quantized_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    mixin = Quantized
    if cls.forward is nn.Embedding.forward:
        mixin = _QuantizedEmbedding
    elif names and (cls.forward is nn.Linear.forward or named_conv1d(cls)):
        mixin = _QuantizedLinear
    elif names and any(_is_plainly(cls, known) for known in CONVOLUTIONS):
        mixin = _QuantizedConv
    elif cls.forward is nn.MultiheadAttention.forward:
        mixin = _QuantizedAttention
    elif set(names) & set(EXPERTS):
        mixin = _QuantizedExperts

    def reader(name: str) -> property:
        return property(lambda self: self.quantized_tensor(name).dequantize(self.float_dtype))

    members: dict[str, Any] = {name: reader(name) for name in names}
    made: Any = type(f"Quantized{cls.__name__}", (mixin, cls), members)
    return cast(type[nn.Module], made)


def _is_plainly(cls: Any, known: Any) -> bool:  # noqa: ANN401
    """Whether a class is a kind of convolution and computes nothing of its own."""
    return issubclass(cls, known) and cls.forward is known.forward and cls._conv_forward is known._conv_forward


def _rebuild(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An empty quantized module of a class; its state follows."""
    quantized = _quantized_class(cls, names)  # type: ignore[arg-type]
    return quantized.__new__(quantized)
