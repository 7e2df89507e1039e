"""Activations that the kernels apply to a product while its results are in the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from dybit.errors import DyBitError


def _keep(x: Tensor) -> Tensor:
    return x


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": _keep,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "quick_gelu": _quick_gelu,
}
ACTIVATIONS = tuple(_FUNCTIONS)  # numbered as in csrc/weight.h


def activate(x: Tensor, name: str) -> Tensor:
    """Applies an activation of :data:`ACTIVATIONS` in plain torch; the empty name returns ``x``.

    Raises:
        DyBitError: The name is unknown.
    """
    return _FUNCTIONS[ACTIVATIONS[activation_number(name)]](x)


def activation_number(name: str) -> int:
    """Returns the number of an activation in the kernels.

    Raises:
        DyBitError: The name is unknown.
    """
    if name not in _FUNCTIONS:
        raise DyBitError(f"activation must be one of {', '.join(ACTIVATIONS[1:])}, not {name!r}")
    return ACTIVATIONS.index(name)
