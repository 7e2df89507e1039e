"""Shared set-up: seeds, threads, a deterministic hypothesis profile, and a header that says what the tests ran on."""

import importlib.util
import os
import random
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

if "DYBIT_KERNELS" in os.environ:  # another build of the extension, as `make sanitize` makes it
    _file = next(Path(os.environ["DYBIT_KERNELS"]).glob("_kernels*.so"))
    _spec = importlib.util.spec_from_file_location("dybit.kernels._kernels", _file)
    sys.modules["dybit.kernels._kernels"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["dybit.kernels._kernels"])

os.environ.pop("COLUMNS", None)  # set by the runner of parallel tests: commands are as wide as without a terminal
torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 on a busy machine
hypothesis.settings.register_profile("derandomized", derandomize=True, deadline=None)
hypothesis.settings.load_profile("derandomized")


def pytest_report_header():
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch._dynamo.reset()
    return 0


@pytest.fixture
def plain_torch(monkeypatch):
    """Without the compiled kernels: plain torch computes bit for bit what fake quantization does."""
    from dybit.kernels import extension

    monkeypatch.setattr(extension, "load", lambda: None)


@pytest.fixture
def restore_isa():
    """Leaves the instruction set as it was."""
    from dybit.kernels import extension

    before = extension.isa()
    yield
    if before in extension.available()[1:]:
        extension.use(before)
