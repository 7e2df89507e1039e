"""Transforms of torch.func, and forward-mode differentiation: the operators have no rules for them.

Within a transform, every new tensor is wrapped and has no memory of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from dybit.errors import DyBitError


def transforming() -> bool:
    """Whether a transform or forward-mode differentiation is active. False under ``torch.compile``."""
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def outside_transforms() -> AbstractContextManager[object]:
    """Computes without the transforms of torch.func. Results are constants for them."""
    return temporarily_clear_interpreter_stack() if transforming() else nullcontext()


def pass_gradients(x: Tensor, rounded: Tensor) -> Tensor:
    """Returns ``rounded`` with the derivatives of ``x``, by operations that have rules for all transforms."""
    return rounded + (x - x.detach()).nan_to_num()


def refuse_transformed(*tensors: Tensor | None) -> None:
    """Checks that no transform differentiates or batches some tensors.

    Raises:
        DyBitError: One does.
    """
    for x in tensors if transforming() else ():
        if x is None:
            continue
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
        if wrapped or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None):
            raise DyBitError(
                "rounding in training has no rules for torch.func and forward-mode differentiation; use backward() or "
                "call convert_ first"
            )
