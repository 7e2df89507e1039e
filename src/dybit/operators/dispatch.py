"""Shared by the operators: when to go through torch's dispatcher, and how to read the spec of a weight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels.transforms import transforming
from dybit.tensors.quantized_tensor import TensorSpec

_RECORDED = ContextVar("recorded", default=False)


@lru_cache(maxsize=4096)
def read_spec(key: str) -> TensorSpec:
    """Returns the spec that :attr:`TensorSpec.key` describes."""
    return TensorSpec.from_dict(json.loads(key))


def traced() -> bool:
    """Whether torch traces the calls: under ``torch.compile``, ``torch.jit.trace`` or a transform."""
    return bool(torch.compiler.is_compiling() or torch._C._get_tracing_state() or transforming())


@contextmanager
def recording() -> Iterator[None]:
    """Lets layers be recorded, while torch traces them, as operators that a program of kernels knows."""
    token = _RECORDED.set(True)
    try:
        yield
    finally:
        _RECORDED.reset(token)


def recorded() -> bool:
    """Whether layers are recorded for a program of kernels: without gradients, and for nobody else."""
    return not torch.compiler.is_dynamo_compiling() and _RECORDED.get()  # Dynamo cannot read the variable


def unwatched(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether torch's dispatcher can be bypassed: no autograd, tracing, dispatch mode or transform is active.

    Dispatching an operator written in Python takes longer than a small product.

    Args:
        x: The input.
        bias: Another tensor that may have a gradient, or None.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._get_tracing_state()
        and not transforming()
    )


def check_values(weight: Tensor, *others: Tensor) -> None:
    """Checks that codes have values if what they meet has: torch would compute with whatever is in memory.

    Args:
        weight: The codes, or something of their device.
        others: The other tensors of an operation.

    Raises:
        DyBitError: The codes are on the meta device, and one of the others is not.
    """
    if weight.is_meta and not all(other.is_meta for other in others):
        raise DyBitError(
            "the weight of a quantized layer is on the meta device, without values: load it, or call the module that "
            "accelerate offloads"
        )


def no_view(y: Tensor) -> Tensor:
    """Returns the same values, not as a view: autograd forbids in-place changes of a view that an operator returned."""
    return cast(Tensor, torch.ops.aten._unsafe_view(y, y.shape)) if y._is_view() else y
