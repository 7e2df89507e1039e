"""Tests of measuring: the cache, going on after an interrupt, executors, workers that die, and bad cells."""

import os
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from searched import Deadly, Poison, batches, mlp, mlp_batches, net
from torch import nn

from dybit import Candidate, DyBitError
from dybit.mixed_precision.candidate import as_candidates
from dybit.mixed_precision.measured_model import Subject
from dybit.mixed_precision.sensitivity import ESTIMATES, measure

SOME = as_candidates(["8/8", "4/8", "2/2", "fp32"])
SUPPORT = Path(__file__).parents[1] / "support"


def cells(folder):
    return list(Path(folder).rglob("*.json"))


def test_cells_are_kept_and_found(tmp_path):
    texts = []
    subject = Subject(mlp(), mlp_batches())
    first = measure(subject, SOME, cache=tmp_path, progress=lambda *step: texts.append(step))
    assert len(cells(tmp_path)) == 6 and texts[-1][:2] == (6, 6) and "W2A2" in texts[-1][2]
    assert [row[3] for row in first.values()] == [0.0, 0.0]
    texts.clear()
    again = measure(Subject(mlp(), mlp_batches()), SOME, cache=tmp_path, progress=lambda *step: texts.append(step))
    assert again == first and not texts
    wider = measure(subject, (*SOME, Candidate(3)), cache=tmp_path)
    assert [row[:4] for row in wider.values()] == list(first.values()) and len(cells(tmp_path)) == 8
    measure(Subject(mlp(), mlp_batches("evaluation")), SOME, cache=tmp_path)
    assert len(cells(tmp_path)) == 14


def test_files_that_are_none_are_measured_anew(tmp_path):
    subject = Subject(mlp(), mlp_batches())
    first = measure(subject, SOME, cache=tmp_path)
    for path, text in zip(cells(tmp_path), ["", "[]", '{"error": "x"}', '{"error": NaN}', "{}", "\0"], strict=True):
        path.write_text(text)
    assert measure(subject, SOME, cache=tmp_path) == first


def test_an_interrupted_measurement_goes_on(tmp_path):
    subject = Subject(net(), batches())
    expected = measure(subject, SOME, cache=tmp_path / "whole")

    def interrupt(done, total, text):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(subject, SOME, cache=tmp_path / "parts", progress=interrupt)
    assert len(cells(tmp_path / "parts")) == 7
    steps = []
    found = measure(subject, SOME, cache=tmp_path / "parts", progress=lambda *step: steps.append(step[:2]))
    assert found == expected and steps[0] == (0, 23)


def test_a_killed_process_loses_nothing_that_was_done(tmp_path):
    script = f"""
import os, sys
sys.path.insert(0, {str(SUPPORT)!r})
from searched import mlp, mlp_batches
from dybit.mixed_precision.candidate import as_candidates
from dybit.mixed_precision.sensitivity import measure
from dybit.mixed_precision.measured_model import Subject
def step(done, total, text):
    if done == 3: os._exit(9)
measure(Subject(mlp(), mlp_batches()), as_candidates(["8/8", "4/8", "2/2"]), cache={str(tmp_path)!r}, progress=step)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=100).returncode == 9
    assert len(cells(tmp_path)) == 3 and not list(tmp_path.rglob("*.tmp"))
    steps = []
    measure(Subject(mlp(), mlp_batches()), SOME, cache=tmp_path, progress=lambda *step: steps.append(step[1]))
    assert steps[0] == 3


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_threads_give_the_same(tmp_path, estimate):
    subject = Subject(net(), batches())
    expected = measure(subject, SOME, estimate, cache=tmp_path / "a")
    with ThreadPoolExecutor(2) as executor:
        assert measure(subject, SOME, estimate, cache=tmp_path / "b", executor=executor) == expected
    assert len(cells(tmp_path / "a")) == len(cells(tmp_path / "b")) == 30


def test_a_worker_is_sent_the_model_once(tmp_path):
    class Counting(ThreadPoolExecutor):
        sent = 0

        def submit(self, function, token, task, payload, parent):
            self.sent += payload is not None
            return super().submit(function, token, task, payload, parent)

    with Counting(1) as executor:
        measure(Subject(net(), batches()), SOME, cache=tmp_path, executor=executor)
    assert 1 <= executor.sent <= 2


def test_processes_give_the_same(tmp_path):
    subject = Subject(mlp(), mlp_batches())
    expected = measure(subject, SOME, cache=tmp_path / "a")
    found = measure(subject, SOME, cache=tmp_path / "b", workers=2)
    for name, row in expected.items():
        assert found[name] == pytest.approx(row, rel=1e-5)


def test_workers_do_not_outlive_a_killed_process(tmp_path):
    script = f"""
import multiprocessing, os, sys, time
sys.path.insert(0, {str(SUPPORT)!r})
from concurrent.futures import ProcessPoolExecutor
from dybit.mixed_precision.sensitivity import _obey_parent
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_obey_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), 9)
"""
    (tmp_path / "script.py").write_text(script)
    run = subprocess.run([sys.executable, tmp_path / "script.py"], check=False, timeout=100, stdout=subprocess.PIPE)
    worker = int(run.stdout)
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return  # dead, and nobody has asked for it yet
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_a_worker_that_dies(tmp_path):
    subject = Subject(Deadly(os.getpid()), mlp_batches())
    candidates = as_candidates(["8", "6", "4", "2"])
    with pytest.raises(DyBitError, match=r"worker died.*of 4 cells are finished and kept.*run it again") as caught:
        measure(subject, candidates, cache=tmp_path, workers=2)
    assert isinstance(caught.value.__cause__, BrokenProcessPool)
    before = len(cells(tmp_path))
    assert len(measure(subject, candidates, cache=tmp_path)["layer"]) == 4
    assert len(cells(tmp_path)) == 4 >= before


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor])
def test_not_a_number(tmp_path, executor):
    subject = Subject(Poison(), mlp_batches())
    pool = executor and executor(1)
    with pytest.raises(DyBitError, match="layer 'second' at W2 failed: the output holds NaN"):
        measure(subject, as_candidates(["2"]), cache=tmp_path, executor=pool)
    assert len(cells(tmp_path)) == 1
    if pool:
        pool.shutdown()


class AtOnce(Executor):
    """Finishes every task before it returns the future, so that all are done when anybody looks."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except DyBitError as error:
            future.set_exception(error)
        return future


def test_what_is_finished_is_kept_when_another_cell_fails(tmp_path):
    subject = Subject(Poison(), mlp_batches())
    for attempt in range(12):  # futures come as a set, in any order
        with pytest.raises(DyBitError, match="layer 'second' at W2 failed"):
            measure(subject, as_candidates(["2"]), cache=tmp_path / str(attempt), executor=AtOnce())
        assert len(cells(tmp_path / str(attempt))) == 1


def test_a_model_that_raises(tmp_path):
    class Picky(nn.Sequential):
        def forward(self, x):
            if type(self[0]) is not nn.Linear:
                raise RuntimeError("not like this")
            return super().forward(x)

    with pytest.raises(DyBitError, match=r"layer '0' at W4 failed.*not like this"):
        measure(Subject(Picky(nn.Linear(6, 4)), mlp_batches()), as_candidates(["4"]), cache=tmp_path)


def test_a_model_that_cannot_be_sent(tmp_path):
    model = mlp()
    model[0].register_forward_hook(lambda *_: None)
    with ThreadPoolExecutor(1) as pool, pytest.raises(DyBitError, match="cannot be sent to workers"):
        measure(Subject(model, mlp_batches()), SOME, cache=tmp_path, executor=pool)


def test_bad_arguments(tmp_path):
    subject = Subject(mlp(), mlp_batches())
    with pytest.raises(DyBitError, match="rmse, fisher, output, kl, not 'hessian'"):
        measure(subject, SOME, "hessian", cache=tmp_path)
    for bad in (0, 1.5, True):
        with pytest.raises(DyBitError, match="workers"):
            measure(subject, SOME, cache=tmp_path, workers=bad)
    (tmp_path / "file").write_text("")
    with pytest.raises(DyBitError, match="cannot be written"):
        measure(subject, SOME, cache=tmp_path / "file")


def test_a_local_dask_cluster(tmp_path):
    distributed = pytest.importorskip("distributed")
    subject = Subject(mlp(), mlp_batches())
    expected = measure(subject, SOME, cache=tmp_path / "a")
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = measure(subject, SOME, cache=tmp_path / "b", executor=client.get_executor())
    assert found.keys() == expected.keys() and torch.allclose(
        *(torch.tensor(list(x.values())) for x in (found, expected))
    )
