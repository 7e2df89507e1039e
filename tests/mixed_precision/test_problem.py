"""Tests of problems: groups, limits, uniform choices and the front."""

import itertools
import math

import numpy as np
import pytest

from dybit.errors import DyBitError
from dybit.mixed_precision.candidate import as_candidates
from dybit.mixed_precision.cost import CostTable
from dybit.mixed_precision.knapsack import InfeasibleError
from dybit.mixed_precision.problem import Problem

SOME = as_candidates(["8/8", "4/8", "2/4"])


def problem(seed=0, layers=5, groups=None, **more):
    rng = np.random.default_rng(seed)
    names = [f"l{i}" for i in range(layers)]
    errors = {name: sorted(float(x) for x in 10 ** rng.uniform(-4, 0, 3)) for name in names}
    cycles = {name: tuple(sorted((float(x) for x in rng.integers(10, 99, 3)), reverse=True)) for name in names}
    sizes = {name: (8.0, 4.0, 2.0) for name in names}
    tables = (
        CostTable("time", "cycles", cycles, 20.0, 20.0 + sum(c[0] for c in cycles.values()), "8/8", per_second=1e6),
        CostTable("size", "bytes", sizes, 3.0, 32.0 * layers, "FP32"),
    )
    return Problem(SOME, groups or tuple((n,) for n in names), errors, tables, **more)


def every_choice(asked):
    for options in itertools.product(range(len(asked.candidates)), repeat=len(asked.groups)):
        yield {name: option for group, option in zip(asked.groups, options, strict=True) for name in group}


@pytest.mark.parametrize("seed", range(4))
def test_solutions_are_the_best_of_all(seed):
    asked = problem(seed, groups=(("l0", "l3"), ("l1",), ("l2",), ("l4",)))
    limits = {"time": 0.7 * asked.main.base, "size": 31.0}
    best = min(asked.error(c) for c in every_choice(asked) if all(asked.costs(c)[n] <= x for n, x in limits.items()))
    found = asked.solve(limits)
    assert asked.error(found) == pytest.approx(best) and found["l0"] == found["l3"]
    bound = 3 * best
    cheapest = min(asked.costs(c)["time"] for c in every_choice(asked) if asked.error(c) <= bound)
    assert asked.costs(asked.solve({}, bound))["time"] == cheapest


def test_totals():
    asked = problem()
    choice = asked.uniform(1)
    assert asked.costs(choice)["size"] == 3 + 5 * 4 and asked.error(choice) == pytest.approx(
        sum(row[1] for row in asked.errors.values())
    )
    assert asked.layers(choice)["l2"] == SOME[1]
    assert asked.cheapest("size") == asked.uniform(2) and asked.most_exact({}) == asked.uniform(0)


def test_impossible_limits():
    with pytest.raises(InfeasibleError):
        problem().solve({"size": 12.0})
    with pytest.raises(InfeasibleError):
        problem().solve({}, 1e-9)


def test_candidates_that_cannot_run_are_not_chosen():
    asked = problem()
    cycles = {name: (math.inf, *row[1:]) for name, row in asked.main.layers.items()}
    table = CostTable("time", "cycles", cycles, 0.0, 500.0, "8/8", per_second=1.0)
    asked = Problem(SOME, asked.groups, asked.errors, (table,))
    assert asked.most_exact({}) == asked.uniform(1) and not asked.runs(asked.uniform(0))
    assert asked.solve({"time": 1e9}) == asked.uniform(1)
    assert math.inf not in [asked.costs(choice)["time"] for choice in asked.front("time", 5)]


def test_uniform_recipes_keep_their_tables():
    asked = problem(embeddings=frozenset({"l0"}), embedding_weights=8)
    assert asked.uniform(2) == {"l0": 0} | dict.fromkeys(("l1", "l2", "l3", "l4"), 2)
    assert problem(embeddings=frozenset({"l0"}), embedding_weights=3).uniform(2)["l0"] == 2


def test_the_front_is_one():
    asked = problem(3, layers=12)
    front = asked.front("time", 20)
    figures = [(asked.costs(choice)["time"], asked.error(choice)) for choice in front]
    assert 15 <= len(front) <= 20
    assert figures == sorted(figures, key=lambda pair: (-pair[0], pair[1]))
    assert front[-1] == asked.cheapest("time")
    with pytest.raises(DyBitError, match="at least 2"):
        asked.front("time", 1)


def test_the_greedy_loop_counts_what_is_fixed():
    asked = problem(1)
    found = asked.greedy("time", 0.8 * asked.main.base)
    assert asked.costs(found)["time"] <= 0.8 * asked.main.base
    assert asked.greedy("time", 21.0) is None
