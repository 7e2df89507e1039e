"""The multiple-choice knapsack: chooses one option per item that minimises one sum within limits of others.

Solved exactly as a mixed-integer linear program. The greedy loop of the DyBit paper is the baseline.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dybit.errors import DyBitError, MissingExtraError

Array = NDArray[np.float64]

_SCALE = 1e4  # scale of the objective at its optimum: HiGHS stops at an absolute gap of 1e-6
_TIGHTER = (0.0, 1e-7, 1e-6, 1e-5)  # HiGHS keeps limits to a tolerance of 1e-7 of them


class InfeasibleError(DyBitError):
    """No choice is within the limits."""


def solve(objective: Array, costs: Sequence[Array], limits: Sequence[float]) -> NDArray[np.int64]:
    """Chooses one option for every item.

    Args:
        objective: Terms of the sum to minimise, at least 0: (items, options); infinite for options that an item does
            not have.
        costs: Terms of the sums to limit, at least 0, of the same shape.
        limits: The limit of each sum.

    Returns:
        The option of every item: (items,).

    Raises:
        InfeasibleError: No choice is within the limits.
        DyBitError: The solver fails.
        MissingExtraError: scipy is not installed.

    Example:
        >>> solve(np.array([[0.0, 1.0], [0.0, 5.0]]), [np.array([[2.0, 1.0], [2.0, 1.0]])], [3.0]).tolist()
        [1, 0]
    """
    objective = np.asarray(objective, dtype=np.float64)
    costs = [np.asarray(cost, dtype=np.float64) for cost in costs]
    allowed = np.all([np.isfinite(table) for table in (objective, *costs)], axis=0)
    if not allowed.any(axis=1).all():
        raise InfeasibleError("an item has no option at all")
    kinds, members = _kinds([objective, *costs])
    first = [part[0] for part in members]
    counts = np.array([len(part) for part in members])
    small = [np.where(allowed, table, 0.0)[first] for table in (objective, *costs)]
    for tighter in _TIGHTER:
        amounts = _program(small[0], small[1:], [limit * (1 - tighter) for limit in limits], allowed[first], counts)
        choice = np.empty(len(kinds), dtype=np.int64)
        for part, amount in zip(members, amounts, strict=True):
            choice[part] = np.repeat(np.arange(amount.size), amount)
        if all(total(cost, choice) <= limit for cost, limit in zip(costs, limits, strict=True)):
            return choice
    raise InfeasibleError("no choice keeps the limits within the solver's precision")


def total(table: Array, choice: NDArray[np.int64]) -> float:
    """Returns the sum of the chosen options."""
    return math.fsum(table[np.arange(len(choice)), choice].tolist())


def _kinds(tables: Sequence[Array]) -> tuple[list[int], list[list[int]]]:
    """Groups items with equal rows in all tables, so that each kind has one integer variable per option."""
    seen: dict[bytes, int] = {}
    kinds = [seen.setdefault(b"".join(t[i].tobytes() for t in tables), len(seen)) for i in range(len(tables[0]))]
    members: list[list[int]] = [[] for _ in seen]
    for item, kind in enumerate(kinds):
        members[kind].append(item)
    return kinds, members


def _program(
    objective: Array, costs: Sequence[Array], limits: Sequence[float], allowed: NDArray[np.bool_], counts: NDArray[Any]
) -> NDArray[np.int64]:
    """Solves for the number of items of every kind with every option: (kinds, options)."""
    optimize, sparse = _scipy()
    kinds, options = objective.shape
    rows, lower, upper = [sparse.kron(sparse.eye(kinds), np.ones((1, options)))], [counts], [counts]
    for cost, limit in zip(costs, limits, strict=True):
        if limit <= 0 and (cost > 0)[allowed].any():
            allowed = allowed & (cost <= limit)
        if limit > 0:
            rows.append(sparse.csr_matrix(cost.reshape(1, -1) / limit))
            lower, upper = [*lower, np.array([-np.inf])], [*upper, np.array([1.0])]
    constraint = optimize.LinearConstraint(sparse.vstack(rows), np.concatenate(lower), np.concatenate(upper))
    bounds = optimize.Bounds(0, np.where(allowed, counts[:, None], 0).ravel())

    def run(scale: float, integral: int) -> Any:  # noqa: ANN401
        with _silence():
            return optimize.milp(
                objective.ravel() * scale,
                integrality=np.full(objective.size, integral),
                bounds=bounds,
                constraints=constraint,
                options={"mip_rel_gap": 0.0},
            )

    largest = float(objective.max()) or 1.0
    relaxed = run(1.0 / largest, 0)
    if relaxed.status == 2:
        raise InfeasibleError("no choice keeps the limits")
    # Errors span many orders of magnitude: scale by the optimum, not by the largest error.
    least = max(relaxed.fun * largest if relaxed.success else largest, largest * 1e-9)
    result = run(_SCALE / least, 1)
    if result.status == 2:
        raise InfeasibleError("no choice keeps the limits")
    if not result.success:
        raise DyBitError(f"the solver gave up: {result.message}")
    amounts: NDArray[np.int64] = np.round(result.x).astype(np.int64).reshape(kinds, options)
    return amounts


@contextmanager
def _silence() -> Iterator[None]:
    """Stops HiGHS from printing to stdout, which its options do not prevent."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def greedy(errors: Array, cost: Array, limit: float, k: int = 3) -> NDArray[np.int64] | None:
    """Runs the loop of the DyBit paper: starts with the most exact options and repeatedly narrows the ``k`` best items.

    Args:
        errors: (items, options).
        cost: The sum to be limited.
        limit: Its limit.
        k: Items to narrow before the cost is checked again.

    Returns:
        The option of every item, or None if the loop ends above the limit.
    """
    ladders = [_ladder(errors[i], cost[i]) for i in range(len(errors))]
    step = np.zeros(len(errors), dtype=np.int64)

    def choice() -> NDArray[np.int64]:
        return np.array([ladder[s] for ladder, s in zip(ladders, step, strict=True)])

    while total(cost, choice()) > limit:
        left = [i for i, ladder in enumerate(ladders) if step[i] + 1 < len(ladder)]
        if not left:
            return None
        for item in sorted(left, key=lambda i: float(errors[i][ladders[i][step[i] + 1]]))[:k]:
            step[item] += 1
    return choice()


def _ladder(errors: Array, cost: Array) -> list[int]:
    """Returns the options of an item from exact to cheap, without dominated ones."""
    ladder: list[int] = []
    for option in sorted(range(len(errors)), key=lambda o: (errors[o], cost[o])):
        if math.isfinite(cost[option]) and (not ladder or cost[option] < cost[ladder[-1]]):
            ladder.append(option)
    return ladder


def _scipy() -> tuple[Any, Any]:
    try:
        return import_module("scipy.optimize"), import_module("scipy.sparse")
    except ImportError:
        raise MissingExtraError('the search needs scipy: pip install "dybit[search]"') from None
