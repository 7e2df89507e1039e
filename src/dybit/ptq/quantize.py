"""Quantizes whole models in place: finds the layers, prepares the model, and runs a chain of algorithms on it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

from torch import nn

from dybit.errors import DyBitWarning
from dybit.models.batch_norm import find_pairs, fold_
from dybit.models.coverage import measure
from dybit.models.own_text import own_text
from dybit.models.plan import plan_layers, quantized_names
from dybit.models.preparation import bypass_fast_path_, folded_pairs, make_plain_
from dybit.models.rollback import undone_on_failure
from dybit.models.running import Progress, evaluating, ordinary_tensors
from dybit.ptq import chain
from dybit.ptq.rounding.nearest import check_without_calibration
from dybit.recipe import Recipe


def quantize_(
    model: nn.Module,
    recipe: Recipe,
    calibration: Iterable[Any] | str | None = None,
    *,
    algorithm: str | Sequence[str] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Quantizes a model in place.

    It quantizes linear layers, convolutions (also transposed), embeddings and embedding bags, recurrent layers and
    cells, ``nn.MultiheadAttention``, transformers' ``Conv1D`` and experts, and subclasses of these. Everything else
    stays unchanged. Tied weights stay tied, a shared module is quantized once, and weight and spectral norms are made
    permanent. In a model in evaluation mode, a batch norm after a quantized convolution is folded into it; in training
    mode it stays, with a warning.

    The share of quantized weights is logged at level INFO. If more than a tenth stays in floating point without the
    recipe asking for it, a warning names the parts.

    Args:
        model: The model. If quantization fails, it stays unchanged; with transforms this takes a copy of the weights.
        recipe: The formats of the layers.
        calibration: Batches of typical inputs, each a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments. Static activations need them, and they improve weights. ``"auto"`` has a language model
            write them (see :func:`dybit.models.own_text.own_text`).
        algorithm: How weights are rounded and errors corrected: a name, several names in the order of their stages
            (see ``ALGORITHMS``), or ``"auto"`` for a good choice by architecture. None rounds to nearest.
        workdir: A directory in which ``gptq`` stores finished layers, so that the same call resumes after an
            interruption. It is made if needed. None stores nothing.
        strict: Raise an error, before any change, if weights would stay in floating point that the recipe does not
            keep by a rule or by ``weights=None``.
        progress: Called with (done, total, text) before every layer and after the last.

    Returns:
        The same model.

    Raises:
        DyBitError: ``model`` is not a module, is already quantized or has nothing to quantize; a weight is empty, not
            floating point or not finite; a rule matches nothing; the algorithms do not form a chain; calibration is
            missing, empty or does not fit, or the model cannot write it; or ``strict`` is set and weights would stay in
            floating point.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> quantize_(model, Recipe(weights=4, activations=8), calibration=[torch.randn(32, 64)])[0].weight.shape
        torch.Size([64, 64])
    """
    plans = plan_layers(model, recipe)
    if strict:
        measure(model, recipe, quantized_names(plans)).check()
    steps = chain.resolve(algorithm, model, [plan.recipe for plan in plans], calibrated=calibration is not None)
    if calibration is None:
        check_without_calibration(plans)
    if workdir is not None:
        chain.check_workdir(workdir, steps)
    if calibration == "auto":
        with ordinary_tensors(model):
            calibration = own_text(model, progress=progress and (lambda text: progress(0, len(plans), text)))
    elif steps != ("rtn",):
        calibration = chain.materialize(calibration)
    writes = any(chain.ALGORITHMS[step].stage == 0 for step in steps)  # transforms, in place
    with undone_on_failure(model, written=writes), ordinary_tensors(model):
        for plan in plans:
            make_plain_(plan.module)
        if model.training:
            _warn_of_norms(model, quantized_names(plans))
        else:
            names = quantized_names(plans)
            pairs = [pair for pair in find_pairs(model) if pair[0] in names]
            fold_(model, pairs)
            # Beside those of an attempt that failed later, or of an earlier quantization that was undone.
            cast(Any, model)._dybit_folded = [*folded_pairs(model), *pairs]
        bypass_fast_path_(model, [plan.module for plan in plans])
        chain.run_(model, plans, calibration, steps, workdir=workdir, progress=progress)
    cast(Any, model)._dybit_recipe = recipe
    measure(model, recipe).announce(stacklevel=2)
    if progress:
        progress(len(plans), len(plans), "done")
    return model


def _warn_of_norms(model: nn.Module, names: Collection[str]) -> None:
    """Warns of the batch norms that would be folded in evaluation mode."""
    with evaluating(model):
        count = sum(conv in names for conv, _ in find_pairs(model))
    if count:
        norms = "1 batch norm is" if count == 1 else f"{count} batch norms are"
        warnings.warn(
            f"the model is in training mode, so {norms} not merged into convolutions and fuse cannot speed it up; "
            "call model.eval() first",
            DyBitWarning,
            stacklevel=3,
        )
