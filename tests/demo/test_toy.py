import random
import socket

import numpy as np
import pytest
import torch

from dybit.demo import digits, mnist1d
from dybit.errors import DyBitError


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a demo reached for the net")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("load", "train", "test", "width"),
    [(digits, 1437, 360, 64), (mnist1d, 4000, 1000, 40)],
    ids=["digits", "mnist1d"],
)
def test_shapes_and_scale(load, train, test, width):
    train_x, train_y, test_x, test_y = load()
    assert train_x.shape == (train, width) and test_x.shape == (test, width)
    assert train_y.shape == (train,) and test_y.shape == (test,)
    assert train_x.dtype == torch.float32 and train_y.dtype == torch.int64
    assert abs(train_x.mean()) < 1e-5 and abs(train_x.std() - 1) < 1e-5
    assert set(train_y.tolist()) == set(test_y.tolist()) == set(range(10))


def test_no_sample_is_in_both_parts():
    train_x, _, test_x, _ = mnist1d(samples=200)
    assert len(torch.cat([train_x, test_x]).unique(dim=0)) == 200


@pytest.mark.parametrize("load", [digits, lambda: mnist1d(samples=100)], ids=["digits", "mnist1d"])
def test_deterministic(load):
    assert all(torch.equal(one, two) for one, two in zip(load(), load(), strict=True))


def test_mnist1d_leaves_the_global_generators_alone():
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    mnist1d(samples=20)
    assert (random.random(), np.random.rand()) == expected


def test_mnist1d_split():
    train_x, _, test_x, _ = mnist1d(samples=100, train_fraction=0.4)
    assert len(train_x) == 40 and len(test_x) == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 15}, "samples=15"),
        ({"samples": 0}, "samples=0"),
        ({"train_fraction": 1.0}, "train_fraction=1.0"),
    ],
)
def test_mnist1d_rejects(arguments, message):
    with pytest.raises(DyBitError, match=message):
        mnist1d(**arguments)
