"""Tests of timing: taking turns and what is made of the times; no test depends on a clock."""

import numpy as np
import pytest
import torch

from dybit.measure import timing
from dybit.measure.timing import compare, machine


def test_every_contestant_runs_in_every_round(monkeypatch):
    runs = []
    times = compare({"a": lambda: runs.append("a"), "b": lambda: runs.append("b")}, seconds=0, rounds=50)
    assert times["a"].rounds == times["b"].rounds == 5
    assert runs[:2] == ["a", "b"] and sorted(runs[2:]) == ["a"] * 5 + ["b"] * 5
    assert {tuple(runs[i : i + 2]) for i in range(2, 12, 2)} == {("a", "b"), ("b", "a")}


def test_the_number_of_rounds_is_limited():
    assert compare({"a": lambda: None}, seconds=100, rounds=7)["a"].rounds == 7


def test_quartiles_and_paired_ratios():
    first, second = np.array([4.0, 2.0, 6.0]), np.array([2.0, 2.0, 2.0])
    found = timing.paired(second, first)
    assert (found.median, found.ratio, found.ratio_low, found.ratio_high) == (2, 2, 1.5, 2.5)
    assert timing.paired(first, first).ratio == 1


def test_a_pause_comes_before_every_turn_and_a_run_that_is_not_timed_after_it(monkeypatch):
    events = []
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: events.append(seconds))
    ticks = iter(range(100))

    def clock():
        events.append("clock")
        return next(ticks)

    times = timing.take_turns({"a": lambda: events.append("a")}, 0, 1, clock=clock, pause=0.25)
    assert events == ["a"] + [0.25, "a", "clock", "a", "clock"] * 5
    assert times["a"].tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("threads", "alone", "clock", "pause"),
    [
        (1, True, "thread_time", 0),
        (1, False, "perf_counter", 0),
        (2, True, "perf_counter", 0),
        (2, False, "perf_counter", 1),
    ],
)
def test_other_libraries_are_timed_by_the_wall_clock(monkeypatch, threads, alone, clock, pause):
    given = {}

    def turns(contestants, seconds, rounds, **settings):
        given.update(settings)
        return {"a": np.ones(5)}

    monkeypatch.setattr(timing, "take_turns", turns)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    compare({"a": lambda: None}, alone=alone)
    assert given == {"clock": getattr(timing.time, clock), "pause": pause * timing.SPINNING}


def test_no_gradients_are_recorded():
    states = []
    compare({"a": lambda: states.append(torch.is_grad_enabled())}, seconds=0)
    assert states and not any(states)


def test_the_machine():
    found = machine()
    assert found.threads == torch.get_num_threads() and found.isa in str(found) and found.cpu


@pytest.mark.parametrize("text", [None, "vendor_id: x\n"])
def test_a_machine_without_a_name(monkeypatch, tmp_path, text):
    class Elsewhere(type(tmp_path)):
        def read_text(self, encoding):
            if text is None:
                raise OSError
            return text

    monkeypatch.setattr(timing, "Path", Elsewhere)
    timing._cpu.cache_clear()
    assert timing._cpu()
    timing._cpu.cache_clear()
