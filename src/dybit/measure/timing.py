"""Times several functions in one process, in turns, and summarizes their times."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dybit.kernels import extension

SPINNING = 0.015  # seconds, at most, that idle threads of torch and of others wait for work before they sleep
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """The times of one contestant.

    Attributes:
        median: Seconds.
        low: First quartile, seconds.
        high: Third quartile, seconds.
        ratio: Median over the rounds of the first contestant's time divided by this one's. Above 1 is faster.
        ratio_low: First quartile of the ratio.
        ratio_high: Third quartile of the ratio.
        rounds: The number of runs.
    """

    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


@dataclass(frozen=True)
class Machine:
    """The machine that times depend on.

    Attributes:
        cpu: The processor's name.
        isa: The instruction set of the kernels.
        threads: Threads that torch uses.
        torch: Version of torch.
    """

    cpu: str
    isa: str
    threads: int
    torch: str

    def __str__(self) -> str:
        """The machine in one line."""
        plural = "" if self.threads == 1 else "s"
        return f"{self.cpu}, {self.isa} kernels, {self.threads} thread{plural}, torch {self.torch}"


def machine() -> Machine:
    """Returns this machine in its current state."""
    return Machine(_cpu(), extension.isa(), torch.get_num_threads(), torch.__version__)


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def compare(
    contestants: Mapping[str, Callable[[], object]], seconds: float = 0.5, rounds: int = 200, *, alone: bool = True
) -> dict[str, Timing]:
    """Times contestants in turns, as :func:`take_turns`, and summarizes their times.

    With one thread it measures the thread's processor time, which excludes the time slices of other programs. With
    several threads it measures wall-clock time.

    Args:
        contestants: What to run, by name; ratios are against the first.
        seconds: Approximate total time; at least five rounds run.
        rounds: The largest number of rounds.
        alone: Whether all of them run in torch's threads. Otherwise it measures wall-clock time, and with several
            threads every turn waits until idle ones sleep.
    """
    single = torch.get_num_threads() == 1
    clock = time.thread_time if single and alone else time.perf_counter
    pause = 0.0 if single or alone else SPINNING
    times = take_turns(contestants, seconds, rounds, clock=clock, pause=pause)
    first = next(iter(times.values()))
    return {name: paired(value, first) for name, value in times.items()}


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    seconds: float,
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    pause: float = 0.0,
) -> dict[str, np.ndarray]:
    """Times contestants in turns, in a new order every round, so that disturbances affect all alike.

    Args:
        contestants: What to run, by name.
        seconds: Approximate total time; at least five rounds run.
        rounds: The largest number of rounds.
        clock: Returns seconds.
        pause: Seconds to wait before every turn, for other libraries whose idle threads spin for some milliseconds. A
            run that is not timed follows, which wakes the contestant's own threads.

    Returns:
        Seconds of every round, by name: float64 of shape (rounds,).
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    shuffle, order = random.Random(0), list(names)
    with torch.inference_mode():
        for name in names:
            contestants[name]()
        start = time.perf_counter()
        while len(times[names[0]]) < _LEAST_ROUNDS or (
            time.perf_counter() - start < seconds and len(times[names[0]]) < rounds
        ):
            shuffle.shuffle(order)
            for name in order:
                if pause:
                    time.sleep(pause)
                    contestants[name]()
                begin = clock()
                contestants[name]()
                times[name].append(clock() - begin)
    return {name: np.array(value) for name, value in times.items()}


def paired(times: np.ndarray, base: np.ndarray) -> Timing:
    """Summarizes the times of a contestant.

    Args:
        times: Seconds of every round, (rounds,).
        base: Those of the contestant that it is compared with, in the same rounds.
    """
    low, median, high = (float(q) for q in np.percentile(times, [25, 50, 75]))
    ratios = [float(q) for q in np.percentile(base / np.maximum(times, 1e-12), [25, 50, 75])]
    return Timing(median, low, high, ratios[1], ratios[0], ratios[2], len(times))
