"""The search: chooses the formats of every layer for the least loss within a budget, or the least cost within a loss.

Costs come as tables (:mod:`dybit.mixed_precision.cost`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from dybit.errors import DyBitError
from dybit.mixed_precision.candidate import Candidate, as_candidates
from dybit.mixed_precision.constraint import Constraint, MaxSize, Speedup, as_constraints
from dybit.mixed_precision.cost import Cost, CpuCost, ShapeCost, SizeCost, cost_table
from dybit.mixed_precision.measured_model import Subject
from dybit.mixed_precision.problem import Choice, Problem
from dybit.mixed_precision.sensitivity import Estimate, check_arguments, measure
from dybit.mixed_precision.trial import Point, Trial, check_possible, limits_loss, speed_table
from dybit.models.running import Progress
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

SHAPE_CANDIDATES = ("8/8", "6/6", "4/8", "4/4", "2/8", "2/4", "2/2")
# Integer inputs are less accurate than tapered ones but faster: their significands have 8 bits instead of 16.
CPU_CANDIDATES = ("fp32", "8/8", "8/int8", "4/8", "4/int8", "3/int8", "2/int8")


@dataclass(frozen=True)
class Result:
    """The result of a search.

    Attributes:
        recipe: The recipe, for :func:`dybit.quantize_`.
        point: Its figures.
        problem: Layers, candidates, errors and costs of the choice.
        constraints: The constraints.
        sensitivity: How errors were estimated.
        error_unit: The unit of measured errors.
        history: Every recipe that was tried, in order.
        uniform: Recipes of one candidate for all layers, for each that can run; if requested.
        pareto: The front of error against speedup, if requested.
        greedy: The result of the paper's greedy loop at the same cost, if requested and the search minimised the error.
        subject: The model that was searched for; None for mere shapes.
    """

    recipe: Recipe
    point: Point
    problem: Problem
    constraints: tuple[Constraint, ...]
    sensitivity: str
    error_unit: str
    history: tuple[Point, ...]
    uniform: tuple[Point, ...] = ()
    pareto: tuple[Point, ...] = ()
    greedy: Point | None = None
    subject: Subject | None = field(default=None, repr=False, compare=False)


def search(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    constraint: Constraint | Sequence[Constraint],
    cost: Cost | ShapeCost | Sequence[Cost | ShapeCost] | None = None,
    candidates: Iterable[object] | None = None,
    recipe: Recipe | None = None,
    sensitivity: Estimate = "kl",
    groups: Iterable[str] = (),
    shared_inputs: bool = True,
    evaluation: Iterable[Any] | None = None,
    pareto: int = 0,
    baselines: bool = False,
    rounds: int = 8,
    executor: Executor | None = None,
    workers: int = 1,
    cache: str | os.PathLike[str] | None = None,
    quantize: Callable[[nn.Module, Recipe, list[Any]], object] = quantize_,
    progress: Progress | None = None,
) -> Result:
    """Finds a recipe of mixed precision.

    The sensitivities of all layers and the costs of all candidates form a multiple-choice knapsack, which is solved
    exactly. The recipe is then tried on the model: the limited figures are measured, and the limits are tightened or
    relaxed until the measured figures satisfy the constraint.

    Args:
        model: The floating-point model. It is not changed.
        batches: Calibration batches, each a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        constraint: One or several of :class:`Speedup`, :class:`MaxSize`, :class:`MaxError` and :class:`MaxDrop`. With
            one of the last two the first cost is minimised, else the error.
        cost: One or several of :class:`SizeCost`, :class:`CpuCost` and :class:`AcceleratorCost`. None for the size.
        candidates: Choices for every layer: pairs, or words such as ``"4/8"``. None for defaults that suit the cost.
        recipe: All fields but the formats. A rule of None keeps a layer in floating point.
        sensitivity: How errors are estimated: ``rmse``, ``fisher``, ``output`` or ``kl``
            (:func:`dybit.mixed_precision.sensitivity.measure`).
        groups: Patterns of layers with one candidate (:meth:`dybit.mixed_precision.measured_model.Subject.groups`).
        shared_inputs: Whether layers with the same input tensor get the same candidate.
        evaluation: Batches to measure errors on; None for ``batches``.
        pareto: Number of recipes from slow to fast to find and try on the model; 0 for none.
        baselines: Whether to try uniform recipes and the paper's greedy loop. ``pareto`` includes uniform recipes.
        rounds: Largest number of recipes to try until the constraint holds.
        executor: Where to measure sensitivities; None for ``workers`` processes.
        workers: Processes; 1 for this process.
        cache: Directory of sensitivities; None for the user's cache directory.
        quantize: Quantizes a copy of the model, in place. It gets the copy, the recipe and the calibration batches.
            Use ``functools.partial(quantize_, ...)`` to pass other arguments.
        progress: Called with (done, total, text).

    Returns:
        The recipe with all figures.

    Raises:
        InfeasibleError: The constraint cannot be met; the message gives the best possible figure.
        DyBitError: An argument is bad, the model cannot be quantized, or a measurement fails.
        MissingExtraError: scipy is not installed.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> import torch
        >>> result = search(model, [torch.randn(64, 16)], constraint=MaxSize(800), candidates=["8", "4", "2"])
        >>> result.point.measured["size"] <= 800
        True
    """
    constraints = as_constraints(constraint)
    check_arguments(sensitivity, workers)
    costs = _costs(cost, constraints)
    every = as_candidates(_default_candidates(costs, recipe) if candidates is None else candidates)
    subject = _subject(model, batches, recipe, costs)
    together = tuple(subject.groups(groups, shared_inputs))
    tables = tuple(cost_table(one, subject, every, _staged(progress, "timing")) for one in costs)
    blank = {name: [0.0] * len(every) for name in subject.layers}
    problem = Problem(every, together, blank, tables, subject.embeddings, subject.recipe.embeddings)
    check_possible(problem, constraints)  # before the long part
    errors = measure(
        subject,
        every,
        sensitivity,
        cache=cache,
        executor=executor,
        workers=workers,
        progress=_staged(progress, "sensitivity"),
    )
    problem = replace(problem, errors=errors)
    trial = Trial(model, subject, problem, constraints, evaluation, progress, quantize)
    found = trial.refine(rounds)
    front = _front(trial, pareto) if pareto else ()
    uniform = _uniform(trial) if baselines or pareto else ()
    greedy = _greedy(trial, found) if baselines and not limits_loss(constraints) else None
    return Result(
        found.recipe,
        found,
        problem,
        constraints,
        sensitivity,
        trial.judge.unit,
        tuple(trial.history),
        uniform,
        front,
        greedy,
        subject,
    )


def _front(trial: Trial, count: int) -> tuple[Point, ...]:
    """Tries recipes from slow to fast."""
    choices = trial.problem.front(speed_table(trial.problem).name, count)
    return tuple(trial.measure(c, f"pareto {index:02d}", strict=False) for index, c in enumerate(choices, 1))


def _uniform(trial: Trial) -> tuple[Point, ...]:
    """Tries one candidate for all layers."""
    choices = uniform_choices(trial.problem)
    return tuple(trial.measure(choice, f"uniform {name}", strict=False) for name, choice in choices.items())


def _greedy(trial: Trial, found: Point) -> Point | None:
    """Tries the recipe of the paper's greedy loop at the cost of the recipe found."""
    limits_time = any(isinstance(one, Speedup) for one in trial.constraints)
    name = speed_table(trial.problem).name if limits_time else "size"
    choice = trial.problem.greedy(name, found.costs[name])
    return None if choice is None else trial.measure(choice, "greedy", strict=False)


def uniform_choices(problem: Problem) -> dict[str, Choice]:
    """Returns the choice of one candidate for all layers, for each candidate that every layer can run."""
    found = {candidate.name: problem.uniform(index) for index, candidate in enumerate(problem.candidates)}
    return {name: choice for name, choice in found.items() if problem.runs(choice)}


def _costs(
    given: Cost | ShapeCost | Sequence[Cost | ShapeCost] | None, constraints: Sequence[Constraint]
) -> list[Cost | ShapeCost]:
    """Returns the costs, with the size if a constraint needs it."""
    costs: list[Cost | ShapeCost] = list(given) if isinstance(given, tuple | list) else []
    if given is not None and not isinstance(given, tuple | list):
        costs = [given]  # type: ignore[list-item]
    for one in costs:
        if isinstance(one, type) or not isinstance(one, Cost | ShapeCost):
            raise DyBitError(f"cost must be SizeCost(), CpuCost(), AcceleratorCost(...) or the like, not {one!r:.100}")
    names = [one.name for one in costs]
    if len(set(names)) < len(names):
        raise DyBitError(f"cost has two of one name: {', '.join(names)}")
    if not costs or (any(isinstance(c, MaxSize) for c in constraints) and "size" not in names):
        costs.append(SizeCost())
    timed = [one for one in costs if not isinstance(one, SizeCost)]
    if any(isinstance(c, Speedup) for c in constraints) and not timed:
        raise DyBitError("Speedup needs a cost that is a time: cost=CpuCost() or cost=AcceleratorCost()")
    return costs


def _default_candidates(costs: Sequence[Cost | ShapeCost], recipe: Recipe | None) -> list[Candidate]:
    if any(isinstance(one, ShapeCost) for one in costs):
        return [Candidate.parse(word) for word in SHAPE_CANDIDATES]
    if any(isinstance(one, CpuCost) for one in costs):
        return [Candidate.parse(word) for word in CPU_CANDIDATES]
    return [Candidate(bits, recipe.activations if recipe else None) for bits in (8, 6, 5, 4, 3, 2)]


def _subject(
    model: nn.Module, batches: Iterable[Any], recipe: Recipe | None, costs: Sequence[Cost | ShapeCost]
) -> Subject:
    """Makes the measured model. Costs in time leave out pure embedding tables, whose width changes no time."""
    subject = Subject(model, batches, recipe)
    if any(isinstance(one, SizeCost) for one in costs):
        return subject
    for name in list(subject.layers):
        if name in subject.embeddings and not subject.ties[name]:
            del subject.layers[name], subject.ties[name]
    if not subject.layers:
        raise DyBitError("there is nothing to search: the model has embedding tables only")
    return subject


def _staged(progress: Progress | None, stage: str) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total, text: progress(done, total, f"{stage}: {text}")
