"""Peak memory of a forward, measured in a process of its own by the kernel's counters (Linux)."""

from __future__ import annotations

import ctypes
import gc
import inspect
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dybit import fuse, load
from dybit.kernels import extension
from dybit.models.running import run_batch


def fused(model: nn.Module, example: Any) -> nn.Module:
    """The fused model; the example is given to versions of ``fuse`` that take one."""
    return fuse(model, example) if len(inspect.signature(fuse).parameters) > 1 else fuse(model)


def peak_of_forward(
    make: Callable[[], nn.Module], checkpoint: Path | None, batch: Any, threads: int, isa: str
) -> int | None:
    """Bytes that a model and its forward add to a process at their peak; None where the system does not say.

    The model and a first forward are there before: counted are weights, what is kept beside them, and activations.

    Args:
        make: Makes the FP32 model; a function of a module, since a new process calls it.
        checkpoint: Of the quantized model, which is loaded and fused; None for FP32.
        batch: The inputs.
        threads: Of torch.
        isa: The instruction set of the kernels.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, make, checkpoint, batch, threads, isa).result()


def _measure(make: Callable[[], nn.Module], checkpoint: Path | None, batch: Any, threads: int, isa: str) -> int:
    torch.set_num_threads(threads)
    if isa != extension.isa():
        extension.use(isa)

    def build() -> nn.Module:
        return make() if checkpoint is None else fused(load(checkpoint, make()), batch)

    model = build()  # a program does not take tensors that were made in inference mode
    with torch.inference_mode():
        run_batch(model, batch)
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        run_batch(model, batch)
        peak = _status("VmHWM")
        del model
        _trim()
        return peak - _status("VmRSS")  # what libraries hold is there with and without the model


def _trim() -> None:
    """Gives free memory back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
