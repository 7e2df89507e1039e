"""Tests of trials: what is asked for holds on measured figures, or it is said why not."""

import math
import re
from dataclasses import replace

import pytest
import torch
from searched import mlp, mlp_batches, score

import dybit.mixed_precision.trial
from dybit import AcceleratorCost, DyBitError, MaxDrop, MaxError, MaxSize, SizeCost, Speedup
from dybit.measure.timing import Timing
from dybit.mixed_precision.candidate import as_candidates
from dybit.mixed_precision.cost import cost_table
from dybit.mixed_precision.knapsack import InfeasibleError
from dybit.mixed_precision.measured_model import Judge, Subject
from dybit.mixed_precision.problem import Problem
from dybit.mixed_precision.search import search
from dybit.mixed_precision.sensitivity import measure
from dybit.mixed_precision.trial import Trial, check_possible

SOME = as_candidates(["8", "6", "5", "4", "3", "2"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    subject = Subject(mlp(), mlp_batches())
    tables = (cost_table(SizeCost(), subject, SOME),)
    errors = measure(subject, SOME, cache=tmp_path_factory.mktemp("cells"))
    return subject, Problem(SOME, tuple(subject.groups()), errors, tables)


def trial(made, *constraints, evaluation=None):
    return Trial(mlp(), made[0], made[1], constraints, evaluation, None)


@pytest.mark.parametrize("limit", [1e-4, 1e-3, 1e-2])
def test_an_error_holds_on_the_real_model(made, limit):
    one = trial(made, MaxError(limit))
    found = one.refine(10)
    assert found.error <= limit and found.error == one.judge.error(one_model(made, found))
    smaller = [p for p in one.history if p.costs["size"] < found.costs["size"]]
    assert all(point.error > limit for point in smaller)


def one_model(made, point):
    return dybit.quantize_(mlp(), point.recipe, mlp_batches())


def test_estimates_that_are_off_are_corrected(made):
    subject, problem = made
    wrong = {name: [30 * error for error in row] for name, row in problem.errors.items()}
    for errors in (wrong, {name: [error / 30 for error in row] for name, row in problem.errors.items()}):
        one = Trial(mlp(), subject, replace(problem, errors=errors), (MaxError(1e-3),), None, None)
        assert 1e-4 < one.refine(12).error <= 1e-3


def test_an_error_that_cannot_be_met(made):
    with pytest.raises(InfeasibleError, match=r"error of at most 1e-12 cannot be reached.*most exact recipe has \d"):
        trial(made, MaxError(1e-12)).refine(4)


def test_drops(made):
    one = trial(made, MaxDrop(5.0, score))
    found = one.refine(8)
    assert found.drop <= 5 and found.drop == pytest.approx(100 - score(one_model(made, found)))
    default = trial(made, MaxDrop(2.0)).refine(8)
    assert 0 <= default.drop <= 2
    assert trial(made, MaxDrop(100.0, score)).refine(8).choice == made[1].cheapest("size")


def test_other_limits_hold_beside_an_error(made):
    smallest = made[1].costs(made[1].cheapest("size"))["size"]
    found = trial(made, MaxError(1.0), MaxSize(smallest + 60)).refine(6)
    assert found.measured["size"] <= smallest + 60
    with pytest.raises(InfeasibleError, match="cannot be reached"):
        trial(made, MaxError(1e-9), MaxSize(smallest + 60)).refine(6)


@pytest.mark.parametrize("value", ["x", None, math.nan, math.inf])
def test_scores_that_are_no_numbers(made, value):
    with pytest.raises(DyBitError, match="evaluate must return a"):
        trial(made, MaxDrop(1.0, lambda model: value))


def test_drops_need_outputs_that_can_agree():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1)).eval()
    data = [torch.randn(2, 3, 4, 4)]
    with pytest.raises(DyBitError, match="logits or embeddings"):
        search(model, data, constraint=MaxDrop(1.0), candidates=["8"])


def test_possible_limits(made):
    assert check_possible(made[1], [MaxSize(1000)]) == {"size": 1000}
    with pytest.raises(InfeasibleError, match=r"size of 10 bytes cannot be reached.*it is \d+"):
        check_possible(made[1], [MaxSize(10)])
    table = cost_table(AcceleratorCost(), made[0], as_candidates(["8/8", "2/2"]))
    problem = Problem(as_candidates(["8/8", "2/2"]), made[1].groups, dict.fromkeys(made[0].layers, (0, 1)), (table,))
    with pytest.raises(InfeasibleError, match=r"speedup of 100 over 8/8 bits.*it is \d"):
        check_possible(problem, [Speedup(100)])


def test_times_that_turn_out_longer_are_tightened(made, monkeypatch):
    """A model that measures 10 % slower than its layers promise."""
    subject, problem = made
    times = {name: tuple(cost / 8 for cost in row) for name, row in problem.tables[0].layers.items()}
    table = replace(problem.tables[0], name="cpu", unit="seconds", layers=times, fixed=1.0, base=70.0, per_second=1.0)
    problem = replace(problem, tables=(table,))
    one = Trial(mlp(), subject, problem, (Speedup(3.8),), None, None)
    monkeypatch.setattr(one, "_measured", lambda model, choice: {"cpu": 1.1 * table.total(choice)} if choice else {})
    found = one.refine(8)
    assert table.base / found.measured["cpu"] >= 3.8 and len(one.history) > 1
    monkeypatch.setattr(one, "_measured", lambda model, choice: {"cpu": 5 * table.total(choice)})
    one.history.clear()
    with pytest.raises(InfeasibleError, match="measured costs exceed the estimates"):
        one.refine(8)


def test_the_speed_of_a_model_is_measured_against_the_original(made, monkeypatch):
    subject, problem = made
    table = replace(problem.tables[0], name="cpu", unit="seconds", base=8.0, per_second=1.0)
    one = Trial(mlp(), subject, replace(problem, tables=(table,)), (Speedup(1.0),), None, None)
    monkeypatch.setattr(
        dybit.mixed_precision.trial, "compare", lambda runs, s: {n: Timing(1, 1, 1, 2.0, 2, 2, 5) for n in runs}
    )
    assert one._measured(mlp(), problem.uniform(0)) == {"cpu": 4.0}


def test_errors_are_measured_on_evaluation_data(made):
    held = mlp_batches("evaluation")
    found = trial(made, MaxSize(1000), evaluation=held).refine(3)
    assert found.error == pytest.approx(Judge(mlp(), held).error(one_model(made, found)), rel=1e-4)
    assert re.fullmatch(r"round \d", found.name)
