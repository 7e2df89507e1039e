"""Two small labelled data sets, on which a network trains in seconds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dybit.demo import packages
from dybit.errors import DyBitError

Labelled = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Labelled:
    """Handwritten digits of 8 x 8 pixels from scikit-learn, 80% of them for training.

    Returns:
        ``train_x`` float32 (1437, 64), ``train_y`` int64 (1437,), ``test_x`` (360, 64), ``test_y`` (360,);
        inputs have mean 0 and variance 1 over the training pixels.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    bunch = packages.load("sklearn.datasets").load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))  # the file is sorted by writer
    return _standardised(bunch.data[order], bunch.target[order], train=len(order) * 4 // 5)


def mnist1d(samples: int = 5000, train_fraction: float = 0.8) -> Labelled:
    """MNIST-1D: ten classes of noisy signals of 40 points, generated here by its package.

    Args:
        samples: Signals altogether, a multiple of ten. The default is the published data set.
        train_fraction: Share for training.

    Returns:
        ``train_x`` float32 (4000, 40), ``train_y`` int64 (4000,), ``test_x`` (1000, 40), ``test_y`` (1000,)
        for the defaults; inputs have mean 0 and variance 1 over the training signals.

    Raises:
        DyBitError: If ``samples`` is not a positive multiple of ten, or a part would be empty.
        MissingExtraError: If mnist1d is not installed.
    """
    if samples < 10 or samples % 10:
        raise DyBitError(f"samples={samples!r} is not a positive multiple of ten.")
    train = int(samples * train_fraction)
    if not 0 < train < samples:
        raise DyBitError(f"train_fraction={train_fraction!r} leaves no sample for training or for the test.")
    package: Any = packages.load("mnist1d.data")
    arguments = package.get_dataset_args()
    arguments.num_samples = samples
    with _global_generators_kept():
        data = package.make_dataset(arguments)  # unlike get_dataset, this neither downloads nor writes
    inputs = np.concatenate([data["x"], data["x_test"]])
    return _standardised(inputs, np.concatenate([data["y"], data["y_test"]]), train)


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Undo the seeding of the process-wide generators that mnist1d does."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _standardised(inputs: Any, labels: Any, train: int) -> Labelled:  # noqa: ANN401 - arrays of untyped packages
    x = torch.from_numpy(inputs.astype(np.float32))
    y = torch.from_numpy(labels.astype(np.int64))
    x = (x - x[:train].mean()) / x[:train].std()  # statistics of the training part only
    return x[:train], y[:train], x[train:], y[train:]
