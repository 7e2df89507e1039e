"""Quantized layers: supported modules that hold packed codes as weights and round their inputs to codes.

Quantizing a layer changes its class to a generated subclass, in place. The module stays the same object, in the same
containers, with the same forward. ``weight`` becomes a property that dequantizes the packed codes at every read. The
buffer of that name, and so the state dict, holds the codes. Subclasses with their own forward, such as convolutions
that pad first, work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.layers.description import Described
from dybit.layers.input_spec import InputSpec, round_input, round_inputs
from dybit.layers.kinds import named_conv1d
from dybit.layers.offloading import WEIGHT_NORM, module_that_reads, read_by_accelerate
from dybit.layers.patched_forward import is_replaced
from dybit.layers.quantized_weight import QuantizedWeight, plain_values, reads_plain_values
from dybit.layers.tracing import call_leaf, tracer_of
from dybit.operators.dispatch import check_values
from dybit.operators.input_rounding import KEPT, InputRounding
from dybit.operators.packed_cache import ordinary
from dybit.tensors.quantized_tensor import QuantizedTensor

_SIZES = ("num_embeddings", "embedding_dim", "in_features", "out_features")


class Quantized(Described, nn.Module):
    """Mixin of all quantized layers; :func:`swap_` makes them.

    Attributes:
        float_dtype: The type of dequantized weights; follows ``.to(dtype)``.
        added_bias: Whether a bias was added to a layer that had none (:func:`set_bias_`).
        frozen_weights: The weights that did not require gradients in floating point.
        inputs_fixed: Whether a fused model was built for the scale and offset of the inputs.
    """

    float_dtype: torch.dtype
    added_bias: bool = False
    frozen_weights: tuple[str, ...] = ()
    inputs_fixed: bool = False

    def quantized_tensor(self, name: str = "weight") -> QuantizedTensor:
        """Returns the codes, scales and choices of a weight."""
        parts = (self._buffers.get(name + suffix) for suffix in ("", "_scale", "_choice", "_tensor_scale"))
        return QuantizedTensor(self.weight_specs[name], *parts)  # type: ignore[arg-type]

    def read_weight(self, name: str = "weight") -> Tensor:
        """Returns a weight in ``float_dtype``. Its values are computed at first use (:class:`QuantizedWeight`)."""
        stored = self.quantized_tensor(name)
        if reads_plain_values():
            return stored.dequantize(self.float_dtype)
        if read_by_accelerate(depth=1):
            return stored.packed
        if module_that_reads(depth=1) == WEIGHT_NORM:  # which then removes the parameter of that name
            raise DyBitError(f"{name} of a quantized layer cannot be parametrized; call dequantize_ first")
        return QuantizedWeight.of(stored, self.float_dtype)

    @property
    def own_bias(self) -> Tensor | None:
        """Returns the bias, with pruning and parametrizations applied; None without a bias."""
        own = self._parameters
        return own["bias"] if "bias" in own else getattr(self, "bias", None)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As ``nn.Module.parameters``, plus the quantized weights, which cannot be trained."""
        yield from super().parameters(recurse)
        yield from (cast(nn.Parameter, getattr(self, name)) for name in self.weight_specs)

    def input_rounding(self) -> InputRounding:
        """Returns how inputs are rounded, as an argument of operators."""
        spec, get = self.input_spec, self._buffers.get
        return KEPT if spec is None else spec.rounding(get("input_scale"), get("input_offset"))

    def round_input(self, x: Tensor) -> Tensor:
        """Rounds an input to the values of its codes, or returns it unchanged if inputs are not quantized."""
        return round_input(self, x, self.input_rounding())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the wrapped layer's own signature
        """Calls the layer with its hooks. Under torch.fx tracing, the layer becomes a node of the graph."""
        if (tracer := tracer_of(args, kwargs)) is not None:
            return call_leaf(tracer, self, args, kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the wrapped layer's own signature
        """Rounds the input and calls the layer's own forward."""
        if self.input_spec is not None:
            args, kwargs = round_inputs(self, args, kwargs, self.round_input)
        if isinstance(self, nn.MultiheadAttention) and not reads_plain_values():
            for part in (self, self.out_proj):  # whose weights torch reads, and does not call
                for name in getattr(part, "weight_specs", ()):
                    check_values(part.get_buffer(name), *args[:1])
            with plain_values():
                return super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As ``nn.Module.register_buffer``, which would compute a property of that name and refuse the name."""
        tensor = None if tensor is None else ordinary(tensor)
        if name in self.weight_specs or name in ("input_scale", "input_offset"):
            self._buffers[name] = tensor
        else:
            super().register_buffer(name, tensor, persistent)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """As ``nn.Module.__setattr__``, but refuses to replace codes by values.

        Assigning the values that the weight already has changes nothing: tying weights does this.
        """
        if isinstance(value, Tensor) and name in self.__dict__.get("weight_specs", ()):
            spec = self.weight_specs[name]
            if isinstance(value, QuantizedWeight) and value.holds(self._buffers[name]):
                return
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
        if value is None and name in self.__dict__.get("weight_specs", ()):
            raise DyBitError(f"{name} of a quantized layer cannot be replaced by None; call dequantize_ first")
        if name in _SIZES and "weight_specs" in self.__dict__ and value != getattr(self, name):
            raise DyBitError(f"{name} of a quantized layer cannot be changed to {value!r}; call dequantize_ first")
        if isinstance(value, Tensor) and name in self.__dict__.get("_buffers", ()):
            value = ordinary(value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """As ``nn.Module.__delattr__``, but refuses to remove the codes, as parametrizations would."""
        if name in self.__dict__.get("weight_specs", ()):
            raise DyBitError(f"{name} of a quantized layer cannot be removed or parametrized; call dequantize_ first")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module.register_parameter``, but refuses the parameter that pruning registers."""
        if name.endswith("_orig") and name.removesuffix("_orig") in self.weight_specs:
            raise DyBitError(f"{name[:-5]} of a quantized layer cannot be pruned; call dequantize_ first")
        super().register_parameter(name, param)

    def set_input_(self, spec: InputSpec | None, scale: Tensor | None, offset: Tensor | None) -> None:
        """As :meth:`Described.set_input_`.

        Raises:
            DyBitError: A fused model was built for other inputs.
        """
        given = {"input_scale": scale, "input_offset": offset}
        same = spec == self.input_spec
        if self.inputs_fixed and not (same and all(_equal(self._buffers.get(n), t) for n, t in given.items())):
            raise DyBitError("a fused model expects other input rounding; call load before fuse")
        if same:
            return
        self.__dict__.pop("_prepared", None)
        home = next(iter([*self._buffers.values(), *self._parameters.values()]))
        self.input_spec = spec
        for name, tensor in given.items():
            self._buffers.pop(name, None)
            if tensor is not None:
                self.register_buffer(name, tensor.detach().to(home.device if home is not None else None, copy=True))

    def extra_repr(self) -> str:
        """The description of the original class, and how it is quantized."""
        weights = {f"{spec.family}/{spec.group_size or spec.granularity}" for spec in self.weight_specs.values()}
        inputs = f", input={self.input_spec.format}/{self.input_spec.mode}" if self.input_spec else ""
        return f"{super().extra_repr()}, weight={'+'.join(sorted(weights))}{inputs}".lstrip(", ")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        """Moves buffers but keeps their types: half precision would change the scales."""
        before = dict(self._buffers)
        self.__dict__.pop("_prepared", None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None:
                self._buffers[name] = ordinary(new if new.dtype == old.dtype else old.to(new.device))
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype, device="cpu")).dtype
        return self


class FusedModule(nn.Module):
    """A module of a fused model: it holds layers of the model that was fused, under other names."""


def is_fused(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is the result of :func:`dybit.fuse`."""
    return any(isinstance(module, FusedModule) for module in model.modules())


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors, or None, have the same values."""
    return one is other or (one is not None and other is not None and torch.equal(one.cpu(), other.cpu()))


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """Returns the quantized layers of a model by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def is_linear(module: nn.Module) -> bool:
    """Whether a module, quantized or not, only multiplies its only argument by its weight."""
    cls = original_class(module) if isinstance(module, Quantized) else type(module)
    return cls.forward is nn.Linear.forward or named_conv1d(cls)


def is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a module is attention with torch's own forward, which ``attend`` can replace."""
    return type(module).forward is nn.MultiheadAttention.forward and not is_replaced(module)


def original_class(layer: nn.Module) -> type[nn.Module]:
    """Returns the floating-point class of a quantized layer."""
    return next(cls for cls in type(layer).__mro__ if not issubclass(cls, Quantized) and issubclass(cls, nn.Module))
