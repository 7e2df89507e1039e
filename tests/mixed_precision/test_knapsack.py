"""Tests of the exact knapsack against exhaustive search, and of the greedy loop."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dybit import MissingExtraError
from dybit.mixed_precision.knapsack import InfeasibleError, greedy, solve, total


def exhaustive(objective, costs, limits):
    """The least objective within the limits, by trying everything."""
    best = None
    for choice in itertools.product(range(objective.shape[1]), repeat=len(objective)):
        picked = np.array(choice)
        if all(total(cost, picked) <= limit for cost, limit in zip(costs, limits, strict=True)):
            value = total(objective, picked)
            best = value if best is None or value < best else best
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2), st.integers(0, 10**6), st.booleans())
def test_nothing_is_better(items, options, count, seed, repeated):
    rng = np.random.default_rng(seed)
    objective = 10.0 ** rng.uniform(-6, 1, (items, options))
    costs = [rng.integers(1, 10**6, (items, options)).astype(float) for _ in range(count)]
    if repeated:  # symmetric items
        objective[:] = objective[0]
        costs = [np.broadcast_to(cost[0], cost.shape).copy() for cost in costs]
    if options > 1 and items > 1:
        objective[0, 0] = np.inf
    limits = [float(rng.uniform(0.3, 1.1) * np.median(cost) * items) for cost in costs]
    best = exhaustive(objective, costs, limits)
    if best is None or not np.isfinite(best):
        with pytest.raises(InfeasibleError):
            solve(objective, costs, limits)
        return
    found = solve(objective, costs, limits)
    assert all(total(cost, found) <= limit for cost, limit in zip(costs, limits, strict=True))
    assert total(objective, found) <= best * (1 + 1e-9)


def test_zeros_and_ties():
    assert solve(np.zeros((3, 2)), [np.ones((3, 2))], [3.0]).shape == (3,)
    assert solve(np.array([[1.0, 0.0]]), [np.array([[0.0, 1.0]])], [0.0]).tolist() == [0]
    with pytest.raises(InfeasibleError):
        solve(np.ones((1, 2)), [np.ones((1, 2))], [0.0])
    with pytest.raises(InfeasibleError, match="no option"):
        solve(np.full((1, 2), np.inf), [], [])


def test_nothing_is_printed(capfd):
    rng = np.random.default_rng(0)
    for _ in range(5):
        objective, cost = rng.uniform(size=(40, 7)), rng.integers(1, 10**6, (40, 7)).astype(float)
        solve(objective, [cost], [cost.mean() * 30])
    assert capfd.readouterr().out == ""


def test_the_greedy_loop_keeps_the_limit_and_is_never_better():
    rng = np.random.default_rng(1)
    for _ in range(20):
        errors, cost = rng.uniform(size=(9, 4)), rng.uniform(1, 2, (9, 4))
        limit = float(rng.uniform(9.5, 16))
        found = greedy(errors, cost, limit)
        if found is None:
            assert cost.min(1).sum() > limit
            continue
        assert total(cost, found) <= limit
        assert total(errors, found) >= total(errors, solve(errors, [cost], [limit])) - 1e-9


def test_the_greedy_loop_by_hand():
    errors, cost = np.array([[0.0, 1.0, 9.0], [0.0, 2.0, 3.0]]), np.array([[4.0, 2.0, 1.0], [4.0, 2.0, 1.0]])
    assert greedy(errors, cost, 8.0, k=1).tolist() == [0, 0]
    assert greedy(errors, cost, 6.0, k=1).tolist() == [1, 0]
    assert greedy(errors, cost, 3.0, k=1).tolist() == [1, 2]
    assert greedy(errors, cost, 1.0) is None


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match=r"dybit\[search\]"):
        solve(np.ones((1, 1)), [], [])
