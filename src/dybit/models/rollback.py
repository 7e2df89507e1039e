"""Undoing what was done to a model, if it fails halfway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Leaves a model as it was if the body raises: classes, attributes, parameters, buffers and hooks of all modules.

    Tensors are kept, not copied: the body may put others in their place, but must not write to them.
    """
    kept = [(module, type(module), dict(vars(module)), _contents(vars(module))) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, attributes, contents in kept:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for name, values in contents.items():  # in the same containers, to which handles of hooks refer
                attributes[name].clear()
                attributes[name].update(values)
        raise


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Shallow copies of the dictionaries and sets among some attributes."""
    return {name: value.copy() for name, value in attributes.items() if isinstance(value, dict | set)}
