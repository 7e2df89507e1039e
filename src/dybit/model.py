"""Quantizes whole models in place: finds the layers, calibrates, quantizes each by its recipe.

Must not know files, costs or the search.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from dybit.calibrate import InputStatistics, calibrate, choose_dynamic_input, choose_input
from dybit.errors import DyBitError
from dybit.fold import find_pairs, fold_
from dybit.layers import (
    InputSpec,
    Quantized,
    channel_groups,
    channels,
    is_embedding,
    swap_,
    transposed,
    unswap_,
    weight_names,
)
from dybit.recipe import LayerRecipe, Recipe
from dybit.tensor import QuantizedTensor, TensorSpec, check_weight, quantize

Progress = Callable[[int, int, str], None]


class DyBitWarning(UserWarning):
    """Something was left as it was, and the result is still correct."""


@dataclass(frozen=True)
class LayerPlan:
    """A layer to be quantized, and how."""

    name: str
    module: nn.Module
    recipe: LayerRecipe


def quantize_(
    model: nn.Module,
    recipe: Recipe,
    calibration: Iterable[Any] | None = None,
    *,
    progress: Progress | None = None,
) -> nn.Module:
    """Quantizes a model in place.

    Linear layers, convolutions (transposed ones too), embeddings, ``nn.MultiheadAttention`` and transformers'
    ``Conv1D`` are quantized, subclasses included; everything else stays as it is. Tied weights stay tied, a shared
    module is quantized once, weight and spectral norms are made permanent, and a batch norm that follows a quantized
    convolution is folded into it (of a model in evaluation mode).

    Args:
        model: The model. It is checked before anything is changed.
        recipe: What to do.
        calibration: Batches that represent the model's inputs, each a tensor, a tuple or list of positional arguments,
            or a mapping of keyword arguments. Static activations need them; weights are better with them.
        progress: Called with (done, total, text) before every layer and after the last.

    Returns:
        The same model.

    Raises:
        DyBitError: ``model`` is no module, is quantized already or has nothing to quantize; a weight is empty, not
            floating point or not finite; a rule matches nothing; calibration is missing, empty or does not fit.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> quantize_(model, Recipe(weights=4, activations=8), calibration=[torch.randn(32, 64)])[0].weight.shape
        torch.Size([64, 64])
    """
    plans = plan_layers(model, recipe)
    total = len(plans)
    for plan in plans:
        make_plain_(plan.module)
    if not model.training:
        names = {plan.name for plan in plans if plan.recipe.weights is not None}
        pairs = [pair for pair in find_pairs(model) if pair[0] in names]
        fold_(model, pairs)
        # Beside those of an attempt that failed later, or of an earlier quantization that was undone.
        cast(Any, model)._dybit_folded = [*folded_pairs(model), *pairs]
    bypass_fast_path_(model, [plan.module for plan in plans])
    statistics = _statistics(model, plans, calibration, (lambda text: progress(0, total, text)) if progress else None)
    ties = _Ties(plans)
    for index, plan in enumerate(plans):
        if progress:
            progress(index, total, plan.name)
        _quantize_layer(plan, statistics.get(plan.name), ties)
    cast(Any, model)._dybit_recipe = recipe
    if progress:
        progress(total, total, "done")
    return model


def dequantize_(model: nn.Module) -> nn.Module:
    """Turns every quantized layer of a model back into floating point, in place, with the values of its codes.

    Inputs are no longer rounded. What weight-only quantization computes stays the same, bit for bit.

    Returns:
        The same model.
    """
    shared: dict[int, nn.Parameter] = {}
    for layer in list(quantized_layers(model).values()):
        keys = {name: id(layer._buffers[name]) for name in layer.weight_specs}
        unswap_(layer)
        for name, key in keys.items():
            setattr(layer, name, shared.setdefault(key, getattr(layer, name)))
    return model


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """The quantized layers of a model by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def folded_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """The (convolution, batch norm) pairs that :func:`quantize_` folded."""
    return list(getattr(model, "_dybit_folded", []))


def make_plain_(module: nn.Module) -> None:
    """Makes the weight norm or other parametrization of a layer's weights permanent, in place."""
    for name in weight_names(module):
        if parametrize.is_parametrized(module, name):
            # torch removes the property from the class, which copies of the model share: give this module its own.
            made_by_torch: Any = type(module)
            members = {k: v for k, v in vars(made_by_torch).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(made_by_torch.__name__, made_by_torch.__bases__, members)
            parametrize.remove_parametrizations(module, name)
            if name not in module._parameters:  # of frozen weights torch leaves a buffer
                weight = getattr(module, name)
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(weight.detach(), requires_grad=False))
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
                prune.remove(module, name)
            if getattr(hook, "name", None) == name:
                {"WeightNorm": remove_weight_norm, "SpectralNorm": remove_spectral_norm}.get(
                    type(hook).__name__, lambda *_: None
                )(module, name)


def bypass_fast_path_(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Keeps transformer encoders that hold some layers from their fused inference path, which calls none of them.

    It computes on nested tensors where there is a padding mask, which the layers cannot.
    """
    held = {id(layer) for layer in layers}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and any(
            id(part) in held for part in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0


def plan_layers(model: nn.Module, recipe: Recipe, *, values: bool = True) -> list[LayerPlan]:
    """The layers to quantize, those that share a weight with one recipe for it.

    Args:
        model: The model.
        recipe: The recipe.
        values: Whether the values of the weights are checked, too; a model that is still to be loaded has none.

    Raises:
        DyBitError: As :func:`quantize_`.
    """
    if not isinstance(model, nn.Module):
        raise DyBitError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(recipe, Recipe):
        raise DyBitError(f"recipe must be a dybit.Recipe, not {type(recipe).__name__}")
    if quantized_layers(model):
        raise DyBitError(f"model is quantized already: layer {next(iter(quantized_layers(model)))!r} is")
    candidates = {name: module for name, module in model.named_modules() if weight_names(module)}
    if not candidates:
        raise DyBitError(f"model {type(model).__name__} has no layer that can be quantized")
    recipe.check_names(candidates)
    plans = []
    for name, module in candidates.items():
        layer = recipe.layer(name, is_embedding(module))
        if layer is not None and _usable(name, module, layer):
            plans.append(LayerPlan(name, module, layer))
    plans = _agree_on_ties(model, plans)
    if not plans:
        raise DyBitError("the recipe keeps every layer in floating point")
    for plan in plans if values else ():
        _check_layer(plan)
    return plans


def _usable(name: str, module: nn.Module, recipe: LayerRecipe) -> bool:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        warnings.warn(f"layer {name!r} keeps floating point: max_norm changes its weights", DyBitWarning, stacklevel=4)
        return False
    return recipe.weights is not None or (recipe.activations is not None and not is_embedding(module))


def _check_layer(plan: LayerPlan) -> None:
    with torch.no_grad():
        for name in weight_names(plan.module):
            weight = getattr(plan.module, name)
            if isinstance(weight, nn.parameter.UninitializedParameter):
                raise DyBitError(f"layer {plan.name!r} is not initialized: run the model once first")
            try:
                check_weight(weight)
            except DyBitError as error:
                raise DyBitError(f"layer {plan.name!r}: {error}") from None


def _agree_on_ties(model: nn.Module, plans: list[LayerPlan]) -> list[LayerPlan]:
    """Gives layers with one weight in common one recipe for it: that of the first of them in the model.

    An embedding comes first in a language model, so the output layer tied to it takes the table's width. A weight that
    is also in use where it cannot be quantized stays in floating point.
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
                stacklevel=5,
            )
            continue
        first = planned[sharers[0]] if sharers else plan
        recipe = plan.recipe if first is plan else _with_weights_of(plan.recipe, first.recipe)
        result.append(LayerPlan(plan.name, plan.module, recipe))
    return result


def _with_weights_of(recipe: LayerRecipe, other: LayerRecipe) -> LayerRecipe:
    """A recipe with its own activations and the other's weights."""
    names = [field.name for field in fields(LayerRecipe) if field.name.startswith("activation")]
    return replace(other, **{name: getattr(recipe, name) for name in names})


def _statistics(
    model: nn.Module,
    plans: list[LayerPlan],
    calibration: Iterable[Any] | None,
    progress: Callable[[str], None] | None,
) -> Mapping[str, InputStatistics]:
    """Calibrates where the recipe can use it."""
    static = [p for p in plans if p.recipe.activations is not None and p.recipe.activation_mode == "static"]
    if calibration is None:
        if static:
            raise DyBitError(
                f"activations={static[0].recipe.activations!r} are static and need calibration; "
                "pass calibration=batches or set activation_mode='dynamic'"
            )
        weighted = [p.name for p in plans if p.recipe.criterion == "activation" and not is_embedding(p.module)]
        if weighted:
            raise DyBitError(
                f"criterion='activation' of layer {weighted[0]!r} needs calibration; pass calibration=batches"
            )
        return {}
    layers = {plan.name: plan.module for plan in plans if not is_embedding(plan.module)}
    sample = any(plan.recipe.activations is not None for plan in plans)
    statistics = calibrate(model, layers, calibration, sample=sample, progress=progress)
    missed = [name for name, seen in statistics.items() if not seen.seen]
    if missed:
        warnings.warn(
            f"calibration never reached {len(missed)} layers, which go without (static inputs are kept): "
            f"{', '.join(missed[:8])}",
            DyBitWarning,
            stacklevel=3,
        )
    return statistics


def _quantize_layer(plan: LayerPlan, seen: InputStatistics | None, ties: _Ties) -> None:
    recipe, module = plan.recipe, plan.module
    weights = {}
    if recipe.weight_family is not None:
        for name in weight_names(module):
            parameter = getattr(module, name)
            weights[name] = ties.get(parameter) or _quantize_weight(parameter, name, recipe, module, seen)
            ties.put(parameter, weights[name])
    swap_(module, weights, *layer_input(recipe, module, seen))


class _Ties:
    """Remembers the quantized form of the parameters that several layers share."""

    def __init__(self, plans: Iterable[LayerPlan]) -> None:
        uses = Counter(id(p) for plan in plans for p in plan.module.parameters(recurse=False))
        self._shared = {key for key, count in uses.items() if count > 1}
        # The parameter is kept beside its quantized form: once freed, its identity could be another's.
        self._known: dict[int, tuple[nn.Parameter, QuantizedTensor]] = {}

    def get(self, parameter: nn.Parameter) -> QuantizedTensor | None:
        known = self._known.get(id(parameter))
        return known and known[1]

    def put(self, parameter: nn.Parameter, weight: QuantizedTensor) -> None:
        if id(parameter) in self._shared:
            self._known[id(parameter)] = parameter, weight


def _quantize_weight(
    weight: Tensor, name: str, recipe: LayerRecipe, module: nn.Module, seen: InputStatistics | None
) -> QuantizedTensor:
    spec = weight_spec(recipe, tuple(weight.shape), transposed(module))
    weighted = seen is not None and seen.seen and recipe.criterion != "weight"
    importance = _importance(seen, name, spec, module) if weighted and seen else None
    return quantize(weight, spec, method=recipe.method, percentile=recipe.percentile, importance=importance)


def weight_spec(recipe: LayerRecipe, shape: tuple[int, ...], transposed: int = 0) -> TensorSpec:
    """How a recipe that quantizes weights stores one of some shape; see :class:`dybit.tensor.TensorSpec`."""
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
    )


def _importance(seen: InputStatistics, name: str, spec: TensorSpec, module: nn.Module) -> Tensor | None:
    """The second moment of the input that every weight multiplies: (1 or rows, columns).

    For convolutions all positions of a kernel see the same channel; borders are not accounted for. None where the
    channels of the input are not those of the weight: a subclass has put something between them.
    """
    if name == "in_proj_weight":  # the rows of query, key and value
        moments = [seen.second_moment(i) for i in range(3)]
        fits = all(moment.numel() == spec.columns for moment in moments)
        return torch.stack(moments).repeat_interleave(spec.rows // 3, dim=0) if fits else None
    groups = channel_groups(module)
    index = {"k_proj_weight": 1, "v_proj_weight": 2}.get(name, 0)
    moment = seen.second_moment(index)
    if moment.numel() != channels(module, name):
        return None
    by_group = moment.view(groups, -1)
    by_group = by_group.repeat_interleave(spec.columns // by_group.shape[1], dim=1)
    return by_group if groups == 1 else by_group.repeat_interleave(spec.rows // groups, dim=0)


def layer_input(
    recipe: LayerRecipe, module: nn.Module, seen: InputStatistics | None = None
) -> tuple[InputSpec | None, Tensor | None, Tensor | None]:
    """How a layer's inputs are rounded, with the scale and offset of static ones; None for inputs that are kept."""
    families = recipe.activation_families
    if families is None or is_embedding(module):
        return None, None, None
    if recipe.activation_mode == "dynamic":
        family = families[0]
        if seen is not None and seen.seen and seen.low >= 0 and families[1] is not None:
            family = families[1]
        group = recipe.activation_group_size if isinstance(module, nn.Linear) else None
        return choose_dynamic_input(seen, family, group), None, None
    if seen is None or not seen.seen:  # never reached by calibration; a warning has said so
        return None, None, None
    spec, scale, offset = choose_input(
        seen,
        families,
        method=recipe.activation_method,
        percentile=recipe.percentile,
        offset=recipe.activation_offset,
    )
    return spec, scale, offset
