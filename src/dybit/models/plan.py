"""Plans a quantization: which layers of a model, each by which recipe. Checks everything before any change."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.kinds import has_dynamic_inputs, is_embedding, layer_kind, layout, weight_names
from dybit.layers.quantized import quantized_layers
from dybit.models.coverage import unsupported
from dybit.recipe import LayerRecipe, Recipe
from dybit.tensors.encoding import check_range, check_weight
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

_SUFFIXES = ("_scale", "_choice", "_tensor_scale")


@dataclass(frozen=True)
class Plan:
    """A layer to be quantized."""

    name: str
    module: nn.Module
    recipe: LayerRecipe


def plan_layers(model: nn.Module, recipe: Recipe, *, values: bool = True) -> list[Plan]:
    """Returns the layers to quantize, in the order of the model.

    Args:
        model: The model.
        recipe: The recipe.
        values: Whether to check the values of the weights. A model that is not loaded yet has none.

    Raises:
        DyBitError: ``model`` or ``recipe`` has the wrong type, the model is already quantized or has nothing to
            quantize, a weight is empty, not floating point or not finite, or a rule matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise DyBitError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(recipe, Recipe):
        raise DyBitError(f"recipe must be a dybit.Recipe, not {type(recipe).__name__}")
    if quantized_layers(model):
        raise DyBitError(f"model is already quantized: layer {next(iter(quantized_layers(model)))!r} is")
    for name, module in model.named_modules():
        if getattr(module, "prepared_weights", None) is not None:
            raise DyBitError(f"model is prepared for training: call convert_ in place of quantize_ (layer {name!r})")
    candidates = {name: module for name, module in model.named_modules() if weight_names(module)}
    if not candidates:
        raise DyBitError(f"model {type(model).__name__} has no layer that can be quantized")
    recipe.check_names(candidates, unsupported(model))
    # Transformers computes some position tables instead of storing them, so they could not be loaded again.
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    plans = []
    for name, module in candidates.items():
        layer = recipe.layer(name, layer_kind(module))
        if layer is not None and f"{name}.weight" not in unsaved and _usable(name, module, layer):
            plans.append(Plan(name, module, layer))
    plans = _agree_on_ties(model, plans)
    if not plans:
        raise DyBitError("the recipe keeps every layer in floating point")
    for plan in plans if values else ():
        _check_layer(plan)
    return plans


def quantized_names(plans: Iterable[Plan]) -> set[str]:
    """The names of the layers whose weights a plan quantizes."""
    return {plan.name for plan in plans if plan.recipe.weights is not None}


def _usable(name: str, module: nn.Module, recipe: LayerRecipe) -> bool:
    if is_embedding(module) and getattr(module, "max_norm", None) is not None:
        warnings.warn(f"layer {name!r} keeps floating point: max_norm changes its weights", DyBitWarning, stacklevel=4)
        return False
    inputs_alone = recipe.activations is not None and not (is_embedding(module) or has_dynamic_inputs(module))
    return recipe.weights is not None or inputs_alone


def _check_layer(plan: Plan) -> None:
    taken = {*plan.module._parameters, *plan.module._modules, *plan.module._buffers}
    stored = {f"{name}{suffix}" for name in weight_names(plan.module) for suffix in _SUFFIXES}
    for name in sorted(taken & (stored | {"input_scale", "input_offset"})):
        raise DyBitError(
            f"layer {plan.name!r} has a tensor named {name!r}, a name that quantized layers use for their own; rename "
            "it or keep the layer in floating point"
        )
    with torch.no_grad():
        for name in weight_names(plan.module):
            weight = getattr(plan.module, name)
            if isinstance(weight, nn.parameter.UninitializedParameter):
                raise DyBitError(f"layer {plan.name!r} is not initialized: run the model once first")
            try:
                check_weight(weight)
                if plan.recipe.weight_family is not None:
                    check_range(weight, weight_spec(plan.recipe, tuple(weight.shape), **layout(plan.module)))
            except DyBitError as error:
                raise DyBitError(f"layer {plan.name!r}: {error}") from None


def _agree_on_ties(model: nn.Module, plans: list[Plan]) -> list[Plan]:
    """Gives layers that share a weight one recipe for it: that of the first such layer in the model.

    In a language model the embedding comes first, so the output layer tied to it takes the width of the table. A weight
    that is also used outside of quantized layers stays in floating point.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    planned = {plan.name: plan for plan in plans}
    result = []
    for plan in plans:
        mine = [id(p) for n in weight_names(plan.module) if (p := plan.module._parameters.get(n)) is not None]
        sharers = list(dict.fromkeys(name for key in mine for name in owners[key]))
        outside = [name for name in sharers if name not in planned]
        if outside:
            if plan.recipe.weights is None:
                result.append(plan)
                continue
            warnings.warn(
                f"layer {plan.name!r} keeps floating point: {outside[0]!r}, not quantized, has the same weight",
                DyBitWarning,
                stacklevel=4,
            )
            continue
        first = planned[sharers[0]] if sharers else plan
        recipe = plan.recipe if first is plan else _with_weights_of(plan.recipe, first.recipe)
        result.append(Plan(plan.name, plan.module, recipe))
    return result


def _with_weights_of(recipe: LayerRecipe, other: LayerRecipe) -> LayerRecipe:
    """Returns a recipe with its own activations and the other's weights."""
    names = [field.name for field in fields(LayerRecipe) if field.name.startswith("activation")]
    return replace(other, **{name: getattr(recipe, name) for name in names})


class Ties:
    """Remembers the quantized form of the parameters that several layers share."""

    def __init__(self, plans: Iterable[Plan]) -> None:
        uses = Counter(id(p) for plan in plans for p in plan.module.parameters(recurse=False))
        self._shared = {key for key, count in uses.items() if count > 1}
        # Keeps the parameter alive: after it is freed, another object could get its identity.
        self._known: dict[int, tuple[nn.Parameter, QuantizedTensor]] = {}

    def get(self, parameter: nn.Parameter) -> QuantizedTensor | None:
        """The quantized form of a parameter, if it is known."""
        known = self._known.get(id(parameter))
        return known and known[1]

    def put(self, parameter: nn.Parameter, weight: QuantizedTensor) -> None:
        """Remembers the quantized form of a parameter, if other layers share it."""
        if id(parameter) in self._shared:
            self._known[id(parameter)] = parameter, weight


def weight_spec(recipe: LayerRecipe, shape: tuple[int, ...], transposed: int = 0, row_dims: int = 1) -> TensorSpec:
    """Returns how a recipe stores a weight of a given shape; see ``TensorSpec``."""
    family = recipe.weight_family
    assert family is not None
    return TensorSpec(
        family.name,
        shape,
        recipe.scale_granularity,
        recipe.group_size,
        recipe.scale_type,
        recipe.variant_granularity or recipe.scale_granularity,
        transposed,
        row_dims,
    )
