"""Layers in training: supported modules that round their inputs, and their weights at every read.

As in ``quantized``, a module changes its class and stays the same object. ``weight`` is a property that rounds the
floating-point parameter of that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from dybit.errors import DyBitError
from dybit.layers.attention import attend
from dybit.layers.bag import bag_of_rows
from dybit.layers.description import Described, check_picklable
from dybit.layers.experts import run_experts
from dybit.layers.input_spec import InputSpec, round_input, round_inputs
from dybit.layers.kinds import EXPERTS, RECURRENT, named_experts, transposed, weight_names
from dybit.layers.offloading import WEIGHT_NORM, module_that_reads
from dybit.layers.patched_forward import follow_class_
from dybit.layers.quantized_weight import plain_values, reads_plain_values
from dybit.layers.recurrent import MadeWeights, forget_weights_, is_plain, list_weights_, recur, recur_once
from dybit.layers.tracing import call_leaf, tracer_of
from dybit.operators.experts import multiply_by_torch
from dybit.qat.quantizers import InputQuantizer, WeightQuantizer
from dybit.qat.rounded_weight import RoundedWeight
from dybit.tensors.quantized_tensor import TensorSpec


class Prepared(Described, nn.Module):
    """Mixin of all layers in training; :func:`prepare_layer_` makes them.

    Attributes:
        prepared_weights: The names of the weights that are rounded; ``<name>_quantizer`` does it.
        refreshed_weights: The weights whose codebooks this layer updates. A tied weight is updated by one layer only.
        input_spec: How dynamic inputs are rounded, or None. ``input_quantizer`` rounds static ones.
    """

    prepared_weights: tuple[str, ...]
    refreshed_weights: tuple[str, ...]
    input_spec: InputSpec | None

    @property
    def weight_specs(self) -> dict[str, TensorSpec]:  # type: ignore[override]
        """How each weight will be stored, by its name."""
        return {name: self.weight_quantizer_of(name).spec for name in self.prepared_weights}

    def set_input_(self, spec: InputSpec | None, scale: Tensor | None, offset: Tensor | None) -> None:
        """As :meth:`Described.set_input_`, for dynamic inputs. ``input_quantizer`` holds static ones.

        Raises:
            DyBitError: The layer and ``spec`` differ in whether inputs are rounded, or ``spec`` is static.
        """
        if (spec is None) != (self.input_spec is None) or (spec is not None and spec.mode == "static"):
            raise DyBitError(f"inputs are rounded as {spec} in the state dict, as {self.input_spec} in the model")
        self.input_spec = spec

    def weight_quantizer_of(self, name: str) -> WeightQuantizer:
        """Returns the quantizer of a weight."""
        return cast(WeightQuantizer, self._modules[f"{name}_quantizer"])

    @property
    def static_input(self) -> InputQuantizer | None:
        """Returns the quantizer of static inputs, or None."""
        return cast("InputQuantizer | None", self._modules.get("input_quantizer"))

    @property
    def rounds_input(self) -> bool:
        """Whether inputs are rounded."""
        return self.input_spec is not None or self.static_input is not None

    def round_input(self, x: Tensor) -> Tensor:
        """Rounds an input, or returns it unchanged if inputs are not quantized."""
        if self.static_input is not None:
            return cast(Tensor, self.static_input(x))
        return x if self.input_spec is None else round_input(self, x, self.input_spec.rounding())

    def count_pass(self) -> None:
        """Counts a training pass and updates codebooks that are due."""
        for name in self.refreshed_weights:
            quantizer = self.weight_quantizer_of(name)
            if quantizer.count():
                quantizer.refresh(cast(Tensor, self._parameters[name]))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the layer's own signature
        """Calls the layer with its hooks. Under torch.fx tracing, the layer becomes a node of the graph."""
        if (tracer := tracer_of(args, kwargs)) is not None:
            return call_leaf(tracer, self, args, kwargs)
        with plain_values():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the layer's own signature
        """Rounds the input and calls the layer's own forward."""
        self.count_pass()
        if self.rounds_input:
            args, kwargs = round_inputs(self, args, kwargs, self.round_input)
        return super().forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """As ``nn.Module.__setattr__``, but refuses to replace a weight by None."""
        if value is None and name in self.__dict__.get("prepared_weights", ()):
            raise DyBitError(f"{name} of a layer in training cannot be replaced by None; call convert_ first")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """As ``nn.Module.__delattr__``, but refuses to remove a weight, as norms and parametrizations would."""
        if name in self.__dict__.get("prepared_weights", ()):
            raise _refusal(name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module.register_parameter``, but refuses the parameter that pruning registers."""
        if name.endswith("_orig") and name.removesuffix("_orig") in self.prepared_weights:
            raise _refusal(name.removesuffix("_orig"))
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Copies and pickles by the original class, since this one is made at run time."""
        check_picklable(self)
        return _rebuild, (floating_class(self), self.prepared_weights), self.__dict__


class _PreparedEmbedding(Prepared):
    """An embedding that rounds only the rows it looks up."""

    def forward(self, input: Tensor) -> Tensor:
        """Looks rows up: integers of any shape to (*shape, embedding_dim)."""
        self.count_pass()
        layer, weight = cast(nn.Embedding, self), cast(Tensor, self._parameters["weight"])
        index = input.reshape(-1)
        rows = functional.embedding(index, weight, layer.padding_idx, None, 2.0, layer.scale_grad_by_freq, layer.sparse)
        return self.weight_quantizer_of("weight").lookup(rows, index).view(*input.shape, -1)


class _PreparedAttention(Prepared):
    """Multi-head attention. If inputs are rounded, so is that of ``out_proj``, which torch's forward never calls."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As ``nn.MultiheadAttention.forward``."""
        self.count_pass()
        attention = cast(nn.MultiheadAttention, self)
        output = attention.out_proj
        if not self.rounds_input and not (isinstance(output, Prepared) and output.rounds_input):
            if isinstance(output, Prepared):
                output.count_pass()
            return nn.MultiheadAttention.forward(attention, *args, **kwargs)
        rounded: dict[int, Tensor] = {}

        def round_once(x: Tensor) -> Tensor:
            if id(x) not in rounded:
                rounded[id(x)] = self.round_input(x)
            return rounded[id(x)]

        return attend(attention, *args, round_input=round_once, **kwargs)


class _PreparedExperts(Prepared):
    """The experts of a mixture. If inputs are rounded, also rounds the inner inputs of the second product."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """As transformers' experts."""
        self.count_pass()
        weights = {name: getattr(self, name) for name in self.prepared_weights}  # rounded once

        def product(name: str, x: Tensor, expert: Tensor) -> Tensor:
            weight = weights[name].mT if transposed(self) else weights[name]
            return multiply_by_torch(self.round_input(x), expert, weight)

        return run_experts(self, product, *args, **kwargs)


class _PreparedRecurrent(MadeWeights, Prepared):
    """A recurrent layer or cell. If inputs are rounded, also rounds the states."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As the layer's own forward."""
        if not is_plain(floating_class(self)) or not self.rounds_input:
            with self.holding_weights():
                return super().forward(*args, **kwargs)
        self.count_pass()
        weights = {name: getattr(self, name) for name in self.prepared_weights}  # rounded once

        def multiply(x: Tensor, weight: str, bias: str) -> Tensor:
            return functional.linear(self.round_input(x), weights[weight], self._parameters.get(bias))

        compute: Any = recur if isinstance(self, nn.RNNBase) else recur_once
        return compute(self, *args, multiply=multiply, **kwargs)


class _PreparedBag(Prepared):
    """An embedding bag that rounds only the rows it looks up."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As ``nn.EmbeddingBag.forward``."""
        self.count_pass()
        bag, index = cast(nn.EmbeddingBag, self), input.reshape(-1)
        weight = cast(Tensor, self._parameters["weight"])
        rows = functional.embedding(index, weight, bag.padding_idx, None, 2.0, bag.scale_grad_by_freq, bag.sparse)
        rows = self.weight_quantizer_of("weight").lookup(rows, index)
        return bag_of_rows(bag, rows, input, offsets, per_sample_weights)


def prepare_layer_(
    module: nn.Module,
    weights: Mapping[str, WeightQuantizer],
    refreshed: tuple[str, ...],
    input_spec: InputSpec | None = None,
    static_input: InputQuantizer | None = None,
) -> None:
    """Turns a floating-point module into a layer in training, in place.

    Args:
        module: A module for which :func:`dybit.layers.kinds.weight_names` is not empty.
        weights: The quantizers of its weights, by name; empty to round only the inputs. Tied weights share one.
        refreshed: The names of the weights whose codebooks this layer updates.
        input_spec: How dynamic inputs are rounded, or None.
        static_input: The quantizer of static inputs, or None.
    """
    before = type(module)
    module.__class__ = _prepared_class(type(module), tuple(weights))  # type: ignore[arg-type]
    forget_weights_(module)
    layer = cast(Prepared, module)
    layer.prepared_weights, layer.refreshed_weights, layer.input_spec = tuple(weights), refreshed, input_spec
    for name, quantizer in weights.items():
        layer.add_module(f"{name}_quantizer", quantizer)
    if static_input is not None:
        layer.add_module("input_quantizer", static_input)
    for child in layer._modules.values():
        if isinstance(child, WeightQuantizer | InputQuantizer):
            child.train(layer.training)
    follow_class_(layer, before)


def unprepare_(layer: Prepared) -> None:
    """Turns a layer in training back into its floating-point class and weights, in place."""
    for name in (*(f"{name}_quantizer" for name in layer.prepared_weights), "input_quantizer"):
        layer._modules.pop(name, None)
    for attribute in ("prepared_weights", "refreshed_weights", "input_spec"):
        delattr(layer, attribute)
    before = type(layer)
    layer.__class__ = floating_class(layer)  # type: ignore[assignment]
    list_weights_(layer)
    follow_class_(layer, before)


def floating_class(layer: Prepared) -> type[nn.Module]:
    """Returns the floating-point class of a layer in training."""
    return next(cls for cls in type(layer).__mro__ if not issubclass(cls, Prepared) and issubclass(cls, nn.Module))


def prepared_layers(model: nn.Module) -> dict[str, Prepared]:
    """Returns the layers in training of a model by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Prepared)}


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weights of a module that can be quantized, as parameters."""
    found = {name: module._parameters.get(name) for name in weight_names(module)}
    return {name: parameter for name, parameter in found.items() if parameter is not None}


def _refusal(name: str) -> DyBitError:
    return DyBitError(
        f"{name} of a layer in training cannot be removed, pruned or parametrized; do so before prepare_qat_"
    )


@cache
def _prepared_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    mixin = Prepared
    if cls.forward is nn.Embedding.forward:
        mixin = _PreparedEmbedding
    elif cls.forward is nn.EmbeddingBag.forward:
        mixin = _PreparedBag
    elif cls.forward is nn.MultiheadAttention.forward:
        mixin = _PreparedAttention
    elif issubclass(cls, RECURRENT):
        mixin = _PreparedRecurrent
    elif named_experts(cls) or set(names) & set(EXPERTS):
        mixin = _PreparedExperts

    def reader(name: str) -> property:
        def read(layer: Prepared) -> Tensor:
            if not reads_plain_values() and module_that_reads(depth=0) == WEIGHT_NORM:  # which then removes it
                raise _refusal(name)
            trained = cast(Tensor, layer._parameters[name])
            rounded = cast(Tensor, layer.weight_quantizer_of(name)(trained))
            return rounded if reads_plain_values() else RoundedWeight.of(rounded, trained)

        return property(read)

    members: dict[str, Any] = {name: reader(name) for name in names}
    made: Any = type(f"Prepared{cls.__name__}", (mixin, cls), members)
    return cast(type[nn.Module], made)


def _rebuild(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """Makes an empty layer in training of a class; unpickling then sets its state."""
    prepared = _prepared_class(cls, names)  # type: ignore[arg-type]
    return prepared.__new__(prepared)
