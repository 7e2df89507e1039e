"""Rolls back changes of a model if they fail halfway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def undone_on_failure(model: nn.Module, *, written: bool = False) -> Iterator[None]:
    """Restores a model if the body raises: classes, attributes, parameters, buffers and hooks of all modules.

    Args:
        model: The model.
        written: Whether the body writes to parameters, which are then copied. Other tensors are kept, not copied: the
            body may replace them but must not write to them.
    """
    parameters = [p for p in model.parameters() if not is_lazy(p)] if written else []
    copies = [(parameter, parameter.detach().clone()) for parameter in parameters]
    kept = [(module, type(module), dict(vars(module)), _contents(vars(module))) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, attributes, contents in kept:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for name, values in contents.items():  # in the same containers, since handles of hooks refer to them
                attributes[name].clear()
                attributes[name].update(values)
        with torch.no_grad():
            for parameter, value in copies:
                parameter.copy_(value)
        raise


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Returns shallow copies of the dictionaries and sets among attributes."""
    return {name: value.copy() for name, value in attributes.items() if isinstance(value, dict | set)}
