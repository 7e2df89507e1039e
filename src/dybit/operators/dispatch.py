"""What the operators share: when they have to go through torch's dispatcher, and how they are told of a weight."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from dybit.tensors.quantized_tensor import TensorSpec


@lru_cache(maxsize=4096)
def read_spec(key: str) -> TensorSpec:
    """Returns the spec that :attr:`TensorSpec.key` describes."""
    return TensorSpec.from_dict(json.loads(key))


def unwatched(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether nothing records, traces or transforms what happens to tensors, so that no operator need be called.

    Torch's dispatch of an operator written in Python costs more than a small product.

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
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def no_view(y: Tensor) -> Tensor:
    """Returns the same values as no view: autograd refuses to modify a view in place that an operator returned."""
    return cast(Tensor, torch.ops.aten._unsafe_view(y, y.shape)) if y._is_view() else y
