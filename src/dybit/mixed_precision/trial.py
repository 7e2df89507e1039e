"""Trials: recipes are tried on the model until the measured figures satisfy the constraints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from dybit.errors import DyBitError
from dybit.layers.description import without_descriptions
from dybit.measure.fidelity import Reference
from dybit.measure.timing import compare
from dybit.mixed_precision.constraint import Constraint, MaxDrop, MaxError, MaxSize, Speedup
from dybit.mixed_precision.cost import CostTable
from dybit.mixed_precision.knapsack import InfeasibleError
from dybit.mixed_precision.measured_model import Judge, Subject
from dybit.mixed_precision.problem import Choice, Problem
from dybit.models.running import Progress, evaluating, run_batch
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

_CLOSE = 0.9  # a loss within this share of its limit needs no further round


@dataclass(frozen=True)
class Point:
    """A recipe with its figures.

    Attributes:
        name: Its name.
        recipe: The recipe.
        choice: The index of the candidate of every layer.
        estimated_error: The sum of the layers' sensitivities.
        costs: Costs by the tables, by name.
        speedups: The base of every cost divided by the cost.
        error: Measured on the quantized model, infinite if its outputs are not finite; None if not measured.
        measured: Costs measured on the quantized model, by name.
        drop: Points lost, if a constraint limits them.
    """

    name: str
    recipe: Recipe
    choice: Choice
    estimated_error: float
    costs: Mapping[str, float]
    speedups: Mapping[str, float]
    error: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    drop: float | None = None


def check_possible(problem: Problem, constraints: Sequence[Constraint]) -> dict[str, float]:
    """Checks that every limit of a cost can be met, and returns the limits by the name of the cost.

    Raises:
        InfeasibleError: A limit cannot be met; the message gives the best possible figure.
    """
    limits = {}
    for one in constraints:
        if isinstance(one, Speedup):
            table = speed_table(problem)
            limit, best = table.base / one.times, table.total(problem.cheapest(table.name))
            if best > limit:
                raise InfeasibleError(
                    f"a speedup of {one.times:g} over {table.base_name} cannot be reached: with every layer at its "
                    f"cheapest candidate it is {table.base / best:.2f}"
                )
            limits[table.name] = limit
        elif isinstance(one, MaxSize):
            table = problem.table("size")
            best = table.total(problem.cheapest("size"))
            if best > one.nbytes:
                raise InfeasibleError(
                    f"a size of {one.nbytes:.0f} bytes cannot be reached: with every layer at its smallest candidate "
                    f"it is {best:.0f}"
                )
            limits["size"] = one.nbytes
    try:
        problem.solve(limits)
    except InfeasibleError:
        words = " and ".join(f"{name} at most {limit:g}" for name, limit in limits.items())
        raise InfeasibleError(f"no recipe has {words} at the same time") from None
    return limits


def speed_table(problem: Problem) -> CostTable:
    """Returns the first cost that is a time, else the size."""
    return next((table for table in problem.tables if table.per_second is not None), problem.main)


def point(problem: Problem, choice: Choice, name: str, recipe: Recipe, **measured: Any) -> Point:  # noqa: ANN401
    """Returns the figures of a choice."""
    costs = problem.costs(choice)
    speedups = {table.name: table.base / costs[table.name] for table in problem.tables}
    return Point(name, recipe, choice, problem.error(choice), costs, speedups, **measured)


class Trial:
    """Tries recipes on the model, and refines the problem until the measured figures satisfy the constraints."""

    def __init__(
        self,
        model: nn.Module,
        subject: Subject,
        problem: Problem,
        constraints: Sequence[Constraint],
        evaluation: Iterable[Any] | None,
        progress: Progress | None,
        quantize: Callable[[nn.Module, Recipe, list[Any]], object] = quantize_,
    ) -> None:
        self.original, self.subject, self.problem, self.constraints = model, subject, problem, constraints
        self.judge = subject.judge if evaluation is None else Judge(subject.model, list(evaluation))
        self.history: list[Point] = []
        self._progress, self._quantize = progress, quantize
        self._drop = self._evaluator()

    def _evaluator(self) -> Callable[[nn.Module], float] | None:
        """Returns a function for the points that a model loses, if a constraint limits them."""
        for one in self.constraints:
            if isinstance(one, MaxDrop):
                if one.evaluate is not None:
                    score = one.evaluate
                    with evaluating(self.original):
                        full = _score(score, self.original)
                    return lambda model: full - _score(score, model)
                reference = Reference(self.original, self.judge.batches)
                if reference.fidelity.agreement is None:
                    raise DyBitError("MaxDrop without evaluate needs a model whose outputs are logits or embeddings")
                return lambda model: 100.0 * (1.0 - (reference.judge(model).agreement or 0.0))
        return None

    def measure(self, choice: Choice, name: str, strict: bool = True) -> Point:
        """Quantizes the model by a choice and measures it.

        Args:
            choice: The choice.
            name: The name of the point.
            strict: Whether outputs that are not finite raise an error; else the error of the point is infinite.
        """
        for known in self.history:
            if known.choice == choice:
                return point(
                    self.problem, choice, name, known.recipe,
                    error=known.error, measured=known.measured, drop=known.drop,
                )  # fmt: skip
        if self._progress:
            self._progress(len(self.history), 0, f"trying {name}")
        recipe = self.subject.mixed(self.problem.layers(choice))
        quantized = copy.deepcopy(self.original).eval()
        if any(not self.problem.candidates[index].kept for index in choice.values()):
            self._quantize(quantized, recipe, self.subject.batches)
        made = point(
            self.problem,
            choice,
            name,
            recipe,
            error=self._error(quantized, name, strict),
            measured=self._measured(quantized, choice),
            drop=self._drop(quantized) if self._drop else None,
        )
        self.history.append(made)
        return made

    def _error(self, quantized: nn.Module, name: str, strict: bool) -> float:
        try:
            return self.judge.error(quantized)
        except DyBitError as error:
            if strict:
                raise DyBitError(f"the recipe of {name} cannot be used: {error}") from error
            return math.inf

    def _measured(self, quantized: nn.Module, choice: Choice) -> dict[str, float]:
        found = {}
        for table in self.problem.tables:
            if table.name == "size":
                distinct = {
                    (t.data_ptr(), tuple(t.shape)): t for t in without_descriptions(quantized.state_dict()).values()
                }
                found["size"] = float(sum(tensor.nbytes for tensor in distinct.values()))
            elif table.name == "cpu":
                batch = self.subject.batches[0]
                models = {"fp32": self.subject.model, "dybit": quantized}
                times = compare({name: partial(run_batch, m, batch) for name, m in models.items()}, 3.0)
                # relative to the base of the table, which was measured at another time
                found["cpu"] = table.base / times["dybit"].ratio
            else:
                found[table.name] = table.total(choice)
        return found

    def refine(self, rounds: int) -> Point:
        """Tries recipes until the measured figures satisfy the constraints."""
        limits = check_possible(self.problem, self.constraints)
        if limits_loss(self.constraints):
            return self._within_loss(limits, rounds)
        return self._within_costs(limits, rounds)

    def _within_costs(self, limits: dict[str, float], rounds: int) -> Point:
        """Tightens the limits by the amount by which measurements exceed them."""
        asked, tried = dict(limits), None
        for index in range(rounds):
            try:
                tried = self.measure(self.problem.solve(limits), f"round {index + 1}")
            except InfeasibleError:
                break
            over = {name: tried.measured[name] / limit for name, limit in asked.items()}
            if all(share <= 1.0 for share in over.values()):
                return tried
            limits = {name: limit / over[name] * 0.995 if over[name] > 1 else limit for name, limit in limits.items()}
        words = ", ".join(f"{n} {tried.measured[n] if tried else 0:g}, not {limit:g}" for n, limit in asked.items())
        raise InfeasibleError(f"measured costs exceed the estimates; the last recipe has {words}")

    def _within_loss(self, limits: dict[str, float], rounds: int) -> Point:
        """Bisects the limit of the estimated error to find the cheapest recipe within the limit of the loss."""
        asked = _loss(self.constraints)
        limit = asked.error if isinstance(asked, MaxError) else asked.points
        exact = self.problem.most_exact(limits)
        high = self.problem.error(self.problem.cheapest(self.problem.main.name))
        low = min(self.problem.error(exact), high)
        best: Point | None = None
        # Points have another unit than estimates: start with the cheapest recipe, then bisect.
        guess = min(max(limit, low), high) if isinstance(asked, MaxError) else high
        for index in range(rounds):
            try:
                choice = self.problem.solve(limits, guess * (1 + 1e-9))
            except InfeasibleError:  # other limits bind first
                low, guess = guess, math.sqrt(max(guess, high * 1e-9) * high)
                continue
            tried = self.measure(choice, f"round {index + 1}")
            loss = tried.error if tried.drop is None else tried.drop
            assert loss is not None
            main = self.problem.main.name
            if loss <= limit:
                best = tried if best is None or tried.costs[main] < best.costs[main] else best
                low = max(low, guess)
                if loss >= _CLOSE * limit or guess >= high:
                    break
            else:
                high = min(high, guess)
            if high <= low * 1.02:
                break
            # In proportion if that stays inside the interval: small errors add up about linearly.
            scaled = guess * limit / loss if loss > 0 and tried.drop is None else 0.0
            inside = low < scaled < high
            guess = scaled if inside and index < 3 else math.sqrt(max(low, high * 1e-6) * high)
        if best is not None:
            return best
        tried = self.measure(exact, "most exact")
        loss = tried.error if tried.drop is None else tried.drop
        assert loss is not None
        if loss <= limit:
            return tried
        what = "an error" if tried.drop is None else "a drop"
        raise InfeasibleError(
            f"{what} of at most {limit:g} cannot be reached with these candidates: the most exact recipe has {loss:.4g}"
        )


def _score(evaluate: Callable[[Any], float], model: nn.Module) -> float:
    score = evaluate(model)
    try:
        value = float(score)
    except (TypeError, ValueError):
        raise DyBitError(f"evaluate must return a number, not {score!r:.100}") from None
    if not math.isfinite(value):
        raise DyBitError(f"evaluate must return a finite number, not {value}")
    return value


def limits_loss(constraints: Sequence[Constraint]) -> bool:
    """Whether a constraint limits the loss, so that the cost is minimised."""
    return any(isinstance(one, MaxError | MaxDrop) for one in constraints)


def _loss(constraints: Sequence[Constraint]) -> MaxError | MaxDrop:
    return next(one for one in constraints if isinstance(one, MaxError | MaxDrop))
