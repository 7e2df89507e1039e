"""Post-training algorithms as a chain: transforms of the model, a rounding method, corrections of its errors.

A chain has three stages, each optional but the second:

1. **transforms** change the floating-point model in place and keep its function;
2. one **rounding** quantizes the layers;
3. **corrections** bring the quantized model closer to a copy of the floating-point one, taken after the transforms.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from dybit.errors import DyBitError, suggestion
from dybit.formats import catalogue
from dybit.models.plan import Plan
from dybit.models.running import Progress, iterate
from dybit.ptq.corrections.adaround import adaround_
from dybit.ptq.corrections.brecq import brecq_
from dybit.ptq.corrections.statistics import correct_bias_, match_statistics_
from dybit.ptq.rounding.nearest import rtn_
from dybit.ptq.rounding.sequential import gptq_
from dybit.ptq.transforms.equalize import equalize_
from dybit.ptq.transforms.rotate import rotate_
from dybit.ptq.transforms.smooth import smooth_
from dybit.recipe import LayerRecipe

__all__ = ["ALGORITHMS", "Algorithm", "Progress", "check_workdir", "materialize", "resolve", "run_"]

_STAGES = ("transform", "rounding", "correction")


@dataclass(frozen=True)
class Algorithm:
    """A member of a chain.

    Args:
        stage: 0 for a transform, 1 for a rounding, 2 for a correction.
        run: The function.
        calibrated: Whether it needs calibration.
    """

    stage: int
    run: Callable[..., Any]
    calibrated: bool = True


def transform(run: Callable[..., Any], *, by_recipe: bool = False) -> Algorithm:
    """An algorithm ``run(model, names, batches, progress=…)``, or with the recipes of the layers by name for names."""

    def call(model: nn.Module, plans: Sequence[Plan], batches: Any, progress: Progress | None) -> None:  # noqa: ANN401
        layers = {plan.name: plan.recipe for plan in plans}
        run(model, layers if by_recipe else list(layers), batches, progress=progress)

    return Algorithm(0, call)


def correction(run: Callable[..., Any]) -> Algorithm:
    """An algorithm ``run(quantized_model, reference, batches, progress=…)``."""
    return Algorithm(2, run)


# In the order in which stages run; within a stage the caller's order counts.
ALGORITHMS: dict[str, Algorithm] = {
    "equalize": transform(equalize_),
    "smooth": transform(smooth_, by_recipe=True),
    "rotate": transform(rotate_),
    "rtn": Algorithm(1, rtn_, calibrated=False),
    "gptq": Algorithm(1, gptq_),
    "statistics": correction(match_statistics_),
    "bias": correction(correct_bias_),
    "adaround": correction(adaround_),
    "brecq": correction(brecq_),
}


def resolve(
    algorithm: str | Sequence[str] | None,
    model: nn.Module | None,
    recipes: Iterable[LayerRecipe] = (),
    *,
    calibrated: bool,
) -> tuple[str, ...]:
    """Checks a chain and returns its names, with a rounding method added if missing.

    Args:
        algorithm: A name, names, ``"auto"``, or None.
        model: The floating-point model; needed for ``"auto"`` only.
        recipes: The recipes of its layers; needed for ``"auto"`` only.
        calibrated: Whether there is calibration data.

    Raises:
        DyBitError: A name is unknown or given twice, the order is wrong, there is more than one rounding, or an
            algorithm needs calibration.
    """
    if algorithm == "auto":
        return choose(model, recipes, calibrated=calibrated)
    names = (algorithm,) if isinstance(algorithm, str) else tuple(algorithm or ())
    for name in names:
        if name not in ALGORITHMS:
            raise DyBitError(f"algorithm {name!r} is unknown; {suggestion(name, ['auto', *ALGORITHMS])}")
        if names.count(name) > 1:
            raise DyBitError(f"algorithm {name!r} is given {names.count(name)} times in {','.join(names)}")
    roundings = [name for name in names if ALGORITHMS[name].stage == 1]
    if len(roundings) > 1:
        raise DyBitError(f"algorithm has {len(roundings)} rounding methods, {' and '.join(roundings)}; give one")
    for first, second in pairwise(names):
        stages = ALGORITHMS[first].stage, ALGORITHMS[second].stage
        if stages[0] > stages[1]:
            raise DyBitError(
                f"algorithm {second!r} must come before {first!r}, a {_STAGES[stages[1]]} before a {_STAGES[stages[0]]}"
            )
    for name in names:
        if ALGORITHMS[name].calibrated and not calibrated:
            raise DyBitError(f"algorithm {name!r} needs calibration; pass calibration=batches")
    if roundings:
        return names
    place = sum(ALGORITHMS[name].stage == 0 for name in names)
    return (*names[:place], "rtn", *names[place:])


def choose(model: nn.Module | None, recipes: Iterable[LayerRecipe], *, calibrated: bool) -> tuple[str, ...]:
    """Returns the chain for ``"auto"``: the best measured for the kind of model and the widths (docs/accuracy.md)."""
    if not calibrated or model is None:
        return ("rtn",)
    recipes = list(recipes)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if any(isinstance(module, norms) for module in model.modules()):
        return ("rtn", "adaround" if any(_is_narrow(recipe.weights) for recipe in recipes) else "statistics")
    return ("smooth", "gptq") if any(_is_narrow(recipe.activations) for recipe in recipes) else ("gptq",)


def _is_narrow(form: int | str | None) -> bool:
    """Whether a format has four bits or fewer."""
    bits = catalogue.family(form).books[0].bits if isinstance(form, str) else form
    return bits is not None and bits <= 4


def materialize(batches: Iterable[Any] | None) -> list[Any] | None:
    """Returns the batches as a list, since an algorithm runs them more than once.

    Raises:
        DyBitError: ``calibration`` is empty, or not an iterable of batches.
    """
    if batches is None:
        return None
    kept = list(iterate(batches))
    if not kept:
        raise DyBitError("calibration yields no batch")
    return kept


def check_workdir(workdir: str | os.PathLike[str], chain: Sequence[str]) -> None:
    """Checks that the chain uses a directory for finished layers, and that it can be made.

    Raises:
        DyBitError: Neither holds.
    """
    if "gptq" not in chain:
        raise DyBitError(f"workdir={os.fspath(workdir)!r} is for algorithm 'gptq', not for {','.join(chain)}")
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DyBitError(f"workdir={os.fspath(workdir)!r} cannot be made: {error.strerror}") from None


def run_(
    model: nn.Module,
    plans: Sequence[Plan],
    batches: Iterable[Any] | None,
    chain: Sequence[str],
    *,
    workdir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Runs a chain on a prepared model, in place.

    Args:
        model: The model, its batch norms folded.
        plans: The layers to quantize.
        batches: Calibration batches, a list unless the chain is ``rtn`` alone; or None.
        chain: What :func:`resolve` returned.
        workdir: The directory in which ``gptq`` stores finished layers.
        progress: Called with (done, total, text).
    """
    by_stage = [[name for name in chain if ALGORITHMS[name].stage == stage] for stage in range(3)]
    for name in by_stage[0]:
        ALGORITHMS[name].run(model, plans, batches, _named(progress, name))
    plans = [replace(plan, module=model.get_submodule(plan.name)) for plan in plans]
    reference = copy.deepcopy(model) if by_stage[2] else None
    for name in by_stage[1]:
        more = {"workdir": workdir} if name == "gptq" else {}
        ALGORITHMS[name].run(model, plans, batches, progress=progress, **more)
    for name in by_stage[2]:
        ALGORITHMS[name].run(model, reference, batches, progress=_named(progress, name))


def _named(progress: Progress | None, name: str) -> Progress | None:
    """Adds the name of an algorithm to its progress calls."""
    return progress and (lambda done, total, text: progress(done, total, f"{name}: {text}"))
