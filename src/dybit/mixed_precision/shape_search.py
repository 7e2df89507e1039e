"""Search by shapes alone, for networks without weights. Estimates replace measured errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from dybit.errors import DyBitError
from dybit.mixed_precision.candidate import Candidate, as_candidates, mixed_recipe
from dybit.mixed_precision.constraint import Constraint, MaxDrop, MaxError, as_constraints
from dybit.mixed_precision.cost import CostTable, ShapeCost, shape_table
from dybit.mixed_precision.problem import Choice, Problem
from dybit.mixed_precision.search import SHAPE_CANDIDATES, Result, uniform_choices
from dybit.mixed_precision.trial import Point, check_possible, point, speed_table
from dybit.recipe import LayerRecipe, Recipe
from dybit.tensors.scale_search import choose_scales
from dybit.workloads.workload import Workload

ESTIMATE = "shape only"
ERROR_UNIT = "noise-to-signal of a Gaussian in the formats, weighted by shares of parameters and of MACs"
_SAMPLES = 1 << 14


def search_shapes(
    workload: Workload,
    *,
    constraint: Constraint | Sequence[Constraint],
    cost: ShapeCost,
    candidates: Iterable[object] | None = None,
    recipe: Recipe | None = None,
    pareto: int = 0,
) -> Result:
    """Finds a recipe for a network of which only the shapes are known.

    **Errors are not measured.** The error of a layer is the noise-to-signal ratio of its weight format on Gaussian data
    times its share of all parameters, plus the ratio of its activation format times its share of all
    multiply-accumulates. It reflects the size of layers, not their sensitivity. Costs are computed as for a model.

    Args:
        workload: The shapes. All layers are searched, including attention products of two activations.
        constraint: :class:`dybit.Speedup`, :class:`dybit.MaxSize`, or both.
        cost: The cost of shapes.
        candidates: Choices for every layer.
        recipe: All fields but the formats.
        pareto: Number of recipes from slow to fast to find; 0 for none.

    Raises:
        InfeasibleError: The constraint cannot be met.
        DyBitError: An argument is bad, or a constraint needs a model.
    """
    constraints = as_constraints(constraint)
    for one in constraints:
        if isinstance(one, MaxError | MaxDrop):
            raise DyBitError(f"{type(one).__name__} needs a model with weights, and a workload has shapes only")
    every, base = as_candidates(SHAPE_CANDIDATES if candidates is None else candidates), recipe or Recipe()
    if not isinstance(cost, ShapeCost):
        raise DyBitError(f"cost must know shapes, as AcceleratorCost(...) does, not {cost!r:.100}")
    names = [layer.name for layer in workload]
    tables = (shape_table(cost, workload, every, names), _sizes(workload, every))
    errors = shape_errors(workload, every, base)
    problem = Problem(every, tuple((name,) for name in names), errors, tables)
    limits = check_possible(problem, constraints)

    def made(choice: Choice, name: str) -> Point:
        return point(problem, choice, name, mixed_recipe(base, problem.layers(choice)))

    found = made(problem.solve(limits), "round 1")
    speed = speed_table(problem).name
    front = problem.front(speed, pareto) if pareto else []
    loop = problem.greedy(speed, found.costs[speed])
    return Result(
        found.recipe,
        found,
        problem,
        constraints,
        ESTIMATE,
        ERROR_UNIT,
        (found,),
        tuple(made(choice, f"uniform {name}") for name, choice in uniform_choices(problem).items()),
        tuple(made(choice, f"pareto {index:02d}") for index, choice in enumerate(front, 1)),
        None if loop is None else made(loop, "greedy"),
    )


def shape_errors(workload: Workload, candidates: Sequence[Candidate], recipe: Recipe) -> dict[str, list[float]]:
    """Returns estimated errors of every layer in the order of the candidates; see :func:`search_shapes`."""
    parameters, macs = max(sum(layer.parameters for layer in workload), 1), workload.macs
    noises = [gaussian_noise(candidate, recipe) for candidate in candidates]
    return {
        layer.name: [
            2 * inputs * layer.macs / macs
            if layer.dynamic
            else weights * layer.parameters / parameters + inputs * layer.macs / macs
            for weights, inputs in noises
        ]
        for layer in workload
    }


def gaussian_noise(candidate: Candidate, recipe: Recipe) -> tuple[float, float]:
    """Returns the relative energy of the rounding error of standard normal weights and inputs, at the best scale."""
    layer = mixed_recipe(recipe, {"layer": candidate}).layer("layer")
    if layer is None:
        return 0.0, 0.0
    return _noise(layer, True), _noise(layer, False)


@lru_cache(maxsize=256)
def _noise(layer: LayerRecipe, weights: bool) -> float:
    families = layer.activation_families
    family = layer.weight_family if weights else families[0] if families else None
    if family is None:
        return 0.0
    quantiles = (torch.arange(_SAMPLES, dtype=torch.float64, device="cpu") + 0.5) / _SAMPLES
    sample = torch.special.ndtri(quantiles).float()
    scales = choose_scales(
        sample[None], family, granularity="tensor", scale_type=layer.scale_type if weights else "fp32"
    )
    return scales.error / float(sample.double().square().sum())


def _sizes(workload: Workload, candidates: Sequence[Candidate]) -> CostTable:
    """Returns the bytes of the codes of all weights, without scales."""
    layers = {
        layer.name: tuple(layer.parameters * (32 if c.bits[0] is None else c.bits[0]) / 8 for c in candidates)
        for layer in workload
    }
    note = "codes only: no scales, all parameters of a layer at the weights' width"
    return CostTable(
        "size", "bytes", layers, 4.0 * workload.extra_parameters, 4.0 * workload.parameters, "FP32", note=note
    )
