"""Sensitivity: the error of a model when one layer is quantized, for every layer and candidate.

A cell (layer, candidate) is one measurement. Each is stored on disk at once, so that an interrupted search can resume.
Cells run in this process or on any ``concurrent.futures.Executor``.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import pickle
import platform
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dybit.errors import DyBitError
from dybit.mixed_precision.candidate import Candidate
from dybit.mixed_precision.estimators import ESTIMATORS, Estimator, Twins
from dybit.mixed_precision.measured_model import Subject
from dybit.models.running import Progress
from dybit.safe_files import cache_directory, read_json, write_json

Estimate = Literal["rmse", "fisher", "output", "kl"]
ESTIMATES: tuple[str, ...] = get_args(Estimate)
CACHE_VERSION = 2  # increase it if recipes change their meaning

Cell = tuple[str, Candidate]


def measure(
    subject: Subject,
    candidates: Sequence[Candidate],
    estimate: Estimate = "kl",
    *,
    cache: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Measures every cell, or reads it from the cache.

    Args:
        subject: The model with its data.
        candidates: The candidates. Floating point has error 0.
        estimate: ``rmse``: normalised root mean square errors of weights and inputs, added, as in the DyBit paper;
            ``output``: energy of the error of the layer's output over the energy of the output;
            ``fisher``: squared errors of weights and inputs, weighted by squared gradients, an estimate of ``kl``;
            ``kl``: the error of the model's output (``Judge``) with this layer alone quantized.
        cache: Directory of finished cells; None for the user's cache directory.
        executor: Runs the measurements; its workers need dybit. None for ``workers`` processes.
        workers: Processes, each with one thread; 1 for this process.
        progress: Called with (done, total, text).

    Returns:
        For every layer of ``subject.layers`` the errors in the order of ``candidates``.

    Raises:
        DyBitError: ``estimate`` or ``workers`` is bad, a measurement fails or is not a number, or a worker died. Cells
            that were finished are kept.
    """
    check_arguments(estimate, workers)
    folder = Path(cache) if cache is not None else cache_directory() / "sensitivity"
    keys = {(name, c): _key(subject, name, c, estimate) for name in subject.layers for c in candidates}
    known = {key: value for key in set(keys.values()) if (value := _read(folder, key)) is not None}
    missing: dict[str, Cell] = {}
    for cell, key in keys.items():
        if cell[1].kept:
            known[key] = 0.0
        elif key not in known:
            missing.setdefault(key, cell)
    total, done = len(missing), 0
    by_cell = {cell: key for key, cell in missing.items()}
    if progress and total:
        progress(0, total, "preparing")
    for (name, candidate), error in _run(subject, estimate, list(missing.values()), executor, workers, folder):
        _check(name, candidate, error)
        key = by_cell[name, candidate]
        _write(folder, key, {"layer": name, "candidate": candidate.name, "estimate": estimate, "error": error})
        known[key], done = error, done + 1
        if progress:
            progress(done, total, f"{name} {candidate.name}")
    return {name: [known[keys[name, c]] for c in candidates] for name in subject.layers}


def check_arguments(estimate: object, workers: object) -> None:
    """Checks the name of an estimate and a number of workers.

    Raises:
        DyBitError: One of them is bad.
    """
    if estimate not in ESTIMATES:
        raise DyBitError(f"sensitivity must be one of {', '.join(ESTIMATES)}, not {estimate!r}")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise DyBitError(f"workers must be a positive integer, not {workers!r}")


def _key(subject: Subject, name: str, candidate: Candidate, estimate: str) -> str:
    recipes = {n: r and asdict(r) for n, r in subject.layer_recipes(name, candidate).items()}
    text = json.dumps([CACHE_VERSION, estimate, subject.signature, recipes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check(name: str, candidate: Candidate, error: float) -> None:
    if not math.isfinite(error):
        raise DyBitError(f"the error of layer {name!r} at {candidate.name} is {error}, not a finite number")


def _read(folder: Path, key: str) -> float | None:
    try:
        error = read_json(folder / key[:2] / f"{key}.json")["error"]
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: measure again
        return None
    return float(error) if isinstance(error, int | float) and math.isfinite(error) else None


def _write(folder: Path, key: str, cell: Mapping[str, Any]) -> None:
    write_json(folder / key[:2] / f"{key}.json", cell)


# ---- Running the measurements


def _run(
    subject: Subject, estimate: str, cells: list[Cell], executor: Executor | None, workers: int, folder: Path
) -> Iterator[tuple[Cell, float]]:
    if not cells:
        return
    if executor is None and workers == 1:
        yield from _evaluate(subject, estimate, cells)
    elif executor is not None:
        yield from _distribute(subject, estimate, cells, executor, folder)
    else:
        # Not forked: a child of a process whose threads hold locks can hang.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(cells)), mp_context=context, initializer=_obey_parent)
        try:
            yield from _distribute(subject, estimate, cells, pool, folder)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _obey_parent() -> None:
    """Prepares a worker: it ignores Ctrl-C, which its parent handles, and ends if the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _evaluate(subject: Subject, estimate: str, cells: Sequence[Cell]) -> Iterator[tuple[Cell, float]]:
    """Measures cells one by one. Cells of one layer should be adjacent."""
    estimator, twins = ESTIMATORS[estimate](subject, cells), Twins(subject)
    for name, candidate in cells:
        yield (name, candidate), _one(estimator, twins, name, candidate)


def _one(estimator: Estimator, twins: Twins, name: str, candidate: Candidate) -> float:
    try:
        return float(estimator(twins.of(name, candidate), name))
    except (DyBitError, RuntimeError, ValueError, TypeError, ArithmeticError, LookupError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DyBitError(f"measuring layer {name!r} at {candidate.name} failed: {reason}") from error


def _distribute(
    subject: Subject, estimate: str, cells: list[Cell], executor: Executor, folder: Path
) -> Iterator[tuple[Cell, float]]:
    """Sends tasks to an executor, each a few cells of one layer.

    A worker that does not know the subject requests it and gets it once; this works with any executor. The number of
    tasks in flight is about the number of workers known to have the subject. Otherwise the first worker would reject
    all tasks before it gets the subject.
    """
    tasks: list[list[Cell]] = []
    for cell in cells:
        # Estimates other than kl are cheap or share passes: their tasks are whole layers.
        if tasks and tasks[-1][0][0] == cell[0] and estimate != "kl":
            tasks[-1].append(cell)
        else:
            tasks.append([cell])
    _ = subject.statistics, subject.judge  # once here instead of in every worker
    try:
        payload = pickle.dumps((subject, estimate, cells))
    except Exception as error:
        raise DyBitError(f"the model cannot be sent to workers, use workers=1: {error}") from error
    token = hashlib.sha256(payload).hexdigest()
    waiting: dict[Future[Any], list[Cell]] = {}
    ready: set[str] = set()
    tasks.reverse()
    known = 0

    def failed(error: BaseException) -> DyBitError:
        return DyBitError(
            f"a worker died or cannot be reached ({type(error).__name__}: {error}), perhaps for want of memory; "
            f"{known} of {len(cells)} cells are finished and kept in {str(folder)!r}: run it again to go on"
        )

    def submit(task: list[Cell], data: bytes | None) -> None:
        waiting[executor.submit(_work, token, task, data, os.getpid())] = task

    try:
        while waiting or tasks:
            while tasks and len(waiting) < 2 * len(ready) + 2:
                submit(tasks.pop(), None)
            done = wait(waiting, return_when=FIRST_COMPLETED).done
            # In the order of the cells, but those that failed last: what is finished by then is kept.
            for future in sorted((future for future in waiting if future in done), key=_has_failed):
                task = waiting.pop(future)
                worker, result = future.result()
                if result is None:
                    submit(task, payload)
                    continue
                ready.add(worker)
                for cell, value in zip(task, result, strict=True):
                    known += 1
                    yield cell, value
    except DyBitError:
        raise
    except Exception as error:  # an error of the executor: BrokenExecutor, or one of another library
        raise failed(error) from error
    finally:
        for future in waiting:
            future.cancel()


def _has_failed(future: Future[Any]) -> bool:
    return future.cancelled() or future.exception() is not None


_worker = threading.local()  # one per thread, since it changes its copy of the model


def _work(token: str, cells: list[Cell], payload: bytes | None, parent: int) -> tuple[str, list[float] | None]:
    """Runs in a worker. Returns its identity, and the errors of some cells, or None to request the subject."""
    name = f"{platform.node()} {os.getpid()} {threading.get_ident()}"
    if getattr(_worker, "token", None) != token:
        if payload is None:
            return name, None
        if os.getpid() != parent:
            torch.set_num_threads(1)  # there are as many workers as cores: more threads would compete for them
        subject, estimate, every = pickle.loads(payload)
        _worker.token, _worker.estimator, _worker.twins = token, ESTIMATORS[estimate](subject, every), Twins(subject)
    return name, [_one(_worker.estimator, _worker.twins, layer, candidate) for layer, candidate in cells]
