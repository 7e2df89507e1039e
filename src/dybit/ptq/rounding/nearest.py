"""Rounding to the nearest: chooses the scales of every layer's weights and inputs, and changes the layer.

Where there is calibration, errors of weights are weighed by the second moments of the
inputs that they multiply, which is the diagonal of the Hessian of the output's error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.input_spec import InputSpec
from dybit.layers.kinds import (
    channel_groups,
    channels,
    has_dynamic_inputs,
    inner_weights,
    is_embedding,
    layout,
    weight_names,
)
from dybit.layers.swap import swap_
from dybit.models.calibration import InputStatistics, calibrate, choose_dynamic_input, choose_input
from dybit.models.plan import Plan, Ties, weight_spec
from dybit.models.running import Progress
from dybit.recipe import LayerRecipe
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec


def rtn_(
    model: nn.Module,
    plans: Sequence[Plan],
    batches: Iterable[Any] | None,
    *,
    progress: Progress | None = None,
) -> None:
    """Quantizes the layers of a plan in place, rounding every weight to the nearest.

    Args:
        model: The model.
        plans: The layers.
        batches: Calibration batches, iterated once; or None.
        progress: Called with (done, total, text) before every layer.

    Raises:
        DyBitError: Calibration is missing, empty or does not fit.
    """
    total = len(plans)
    statistics = observe(model, plans, batches, (lambda text: progress(0, total, text)) if progress else None)
    ties = Ties(plans)
    for index, plan in enumerate(plans):
        if progress:
            progress(index, total, plan.name)
        quantize_layer(plan, statistics.get(plan.name), ties)


def check_without_calibration(plans: Sequence[Plan]) -> None:
    """Checks that layers can be quantized without calibration.

    Raises:
        DyBitError: Inputs of one are static, or its criterion needs inputs.
    """
    static = [p for p in plans if p.recipe.has_static_inputs]
    if static:
        raise DyBitError(
            f"activations={static[0].recipe.activations!r} are static and need calibration; "
            "pass calibration=batches or set activation_mode='dynamic'"
        )
    weighted = [p.name for p in plans if p.recipe.criterion == "activation" and not is_embedding(p.module)]
    if weighted:
        raise DyBitError(f"criterion='activation' of layer {weighted[0]!r} needs calibration; pass calibration=batches")


def observe(
    model: nn.Module,
    plans: Sequence[Plan],
    calibration: Iterable[Any] | None,
    progress: Callable[[str], None] | None,
) -> Mapping[str, InputStatistics]:
    """Calibrates where the recipe can use it."""
    if calibration is None:
        check_without_calibration(plans)
        return {}
    layers = {plan.name: plan.module for plan in plans if not is_embedding(plan.module)}
    sample = any(plan.recipe.activations is not None for plan in plans)
    statistics = calibrate(model, layers, calibration, sample=sample, progress=progress)
    missed = [name for name, seen in statistics.items() if not seen.seen]
    if missed:
        warnings.warn(
            f"calibration never reached {len(missed)} layers, which are rounded without it and keep static inputs: "
            f"{', '.join(missed[:8])}",
            DyBitWarning,
            stacklevel=5,  # the caller of quantize_,
        )
    return statistics


Choose = Callable[[Tensor, str, TensorSpec], QuantizedTensor | None]


def quantize_layer(plan: Plan, seen: InputStatistics | None, ties: Ties, choose: Choose | None = None) -> None:
    """Quantizes one layer in place.

    Args:
        plan: The layer.
        seen: What calibration saw of its inputs.
        ties: Weights that are already quantized.
        choose: Quantizes a weight, given its name and how to store it; where it returns None, or is None, the weight
            is rounded to the nearest.
    """
    recipe, module = plan.recipe, plan.module
    weights = {}
    if recipe.weight_family is not None:
        for name in weight_names(module):
            parameter = getattr(module, name)
            found = ties.get(parameter)
            if found is None:
                spec = weight_spec(recipe, tuple(parameter.shape), **layout(module))
                found = choose(parameter, name, spec) if choose else None
                found = found or _round(parameter, name, spec, recipe, module, seen)
            weights[name] = found
            ties.put(parameter, found)
    swap_(module, weights, *layer_input(recipe, module, seen))


def _round(
    weight: Tensor, name: str, spec: TensorSpec, recipe: LayerRecipe, module: nn.Module, seen: InputStatistics | None
) -> QuantizedTensor:
    weighted = seen is not None and seen.seen and recipe.criterion != "weight"
    importance = _importance(seen, name, spec, module) if weighted and seen else None
    return quantize(weight, spec, method=recipe.method, percentile=recipe.percentile, importance=importance)


def _importance(seen: InputStatistics, name: str, spec: TensorSpec, module: nn.Module) -> Tensor | None:
    """The second moment of the input that every weight multiplies: (1 or rows, columns).

    For convolutions all positions of a kernel see the same channel; borders are not accounted for. None where the
    channels of the input are not those of the weight: a subclass has put something between them.
    """
    if name == "in_proj_weight":  # the rows of query, key and value
        moments = [seen.second_moment(i) for i in range(3)]
        fits = all(moment.numel() == spec.columns for moment in moments)
        return torch.stack(moments).repeat_interleave(spec.rows // 3, dim=0) if fits else None
    if name in inner_weights(module):
        return None
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
    """How a layer's inputs are rounded, with the scale and offset of static ones; None for inputs that are kept.

    Those of experts and recurrent layers always have dynamic scales: some of them are made inside, where calibration
    does not look.
    """
    families = recipe.activation_families
    if families is None or is_embedding(module):
        return None, None, None
    if has_dynamic_inputs(module):
        return choose_dynamic_input(seen, families[0], recipe.activation_group_size), None, None
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
