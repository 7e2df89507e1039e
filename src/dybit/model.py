"""Quantizes whole models in place: finds the layers, prepares the model, and runs a chain of algorithms on it.

Must not know files, costs or the search, nor what an algorithm does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from dybit import ptq
from dybit.errors import DyBitWarning
from dybit.fold import find_pairs, fold_
from dybit.layers import quantized_layers, unswap_, weight_names
from dybit.plan import plan_layers
from dybit.ptq import Progress
from dybit.recipe import Recipe

__all__ = [
    "DyBitWarning",
    "bypass_fast_path_",
    "dequantize_",
    "folded_pairs",
    "make_plain_",
    "quantize_",
    "quantized_layers",
]


def quantize_(
    model: nn.Module,
    recipe: Recipe,
    calibration: Iterable[Any] | None = None,
    *,
    algorithm: str | Sequence[str] | None = None,
    workdir: str | os.PathLike[str] | None = None,
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
        algorithm: How weights are rounded and errors made up for: a name, or several in the order of their stages (see
            :data:`dybit.ptq.ALGORITHMS`), or ``"auto"`` for a good choice by architecture. None rounds to the nearest.
        workdir: A directory where ``gptq`` keeps the layers that it has finished, so that the same call goes on there
            after an interruption; made if it is not there. None keeps nothing.
        progress: Called with (done, total, text) before every layer and after the last.

    Returns:
        The same model.

    Raises:
        DyBitError: ``model`` is no module, is quantized already or has nothing to quantize; a weight is empty, not
            floating point or not finite; a rule matches nothing; the algorithms are no chain; calibration is missing,
            empty or does not fit.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> quantize_(model, Recipe(weights=4, activations=8), calibration=[torch.randn(32, 64)])[0].weight.shape
        torch.Size([64, 64])
    """
    plans = plan_layers(model, recipe)
    chain = ptq.resolve(algorithm, model, [plan.recipe for plan in plans], calibrated=calibration is not None)
    if workdir is not None:
        ptq.check_workdir(workdir, chain)
    if len(chain) > 1 or chain != ("rtn",):
        calibration = ptq.materialize(calibration)
    for plan in plans:
        make_plain_(plan.module)
    if not model.training:
        names = {plan.name for plan in plans if plan.recipe.weights is not None}
        pairs = [pair for pair in find_pairs(model) if pair[0] in names]
        fold_(model, pairs)
        # Beside those of an attempt that failed later, or of an earlier quantization that was undone.
        cast(Any, model)._dybit_folded = [*folded_pairs(model), *pairs]
    bypass_fast_path_(model, [plan.module for plan in plans])
    ptq.run_(model, plans, calibration, chain, workdir=workdir, progress=progress)
    cast(Any, model)._dybit_recipe = recipe
    if progress:
        progress(len(plans), len(plans), "done")
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
