"""Rolls a transform back if it changes the model's outputs."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dybit.errors import DyBitWarning
from dybit.models.attachments import attachments, detach_
from dybit.models.running import evaluating, run_batch, tensors_of, without_fast_path

_TOLERANCE = 1e-3  # of the outputs' norm; moving factors about costs some 1e-6 in FP32
_ROUNDINGS = 8  # tolerated roundings of half precision: every changed weight is rounded again


@contextmanager
def preserving(model: nn.Module, names: Collection[str], batch: Any, transform: str) -> Iterator[None]:  # noqa: ANN401
    """Undoes what happens inside if it changes the model's outputs on a batch, and warns; also when it is interrupted.

    Args:
        model: The model.
        names: The modules whose own parameters may be changed and to which something may be attached.
        batch: What to compare outputs on.
        transform: What to call it in the warning.
    """
    parameters = {id(p): p for name in names for p in model.get_submodule(name).parameters(recurse=False)}
    saved = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
    attached = set(attachments(model))
    before = _outputs(model, batch)
    keep = False
    try:
        yield
        difference = _difference(before, _outputs(model, batch))
        keep = difference <= _tolerance(saved)
        if not keep:
            warnings.warn(
                f"{transform} is left out: it would change the model's output by {100 * difference:.2g} %",
                DyBitWarning,
                stacklevel=4,
            )
    finally:
        if not keep:
            for parameter, value in saved:
                parameter.data.copy_(value)
            for name in set(attachments(model)) - attached:
                detach_(model.get_submodule(name))


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:  # noqa: ANN401
    with evaluating(model), without_fast_path():
        return tensors_of(run_batch(model, batch, "calibration batch 0"))


def _tolerance(saved: list[tuple[nn.Parameter, Tensor]]) -> float:
    return max(
        [_TOLERANCE, *(_ROUNDINGS * torch.finfo(value.dtype).eps for _, value in saved if value.is_floating_point())]
    )


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest relative change of an output; infinite where the outputs are of another number or not finite."""
    changes = [float("inf")] if len(before) != len(after) else [0.0]
    for old, new in zip(before, after, strict=False):
        change = float((new.double() - old.double()).norm())
        size = float(old.double().norm())
        changes.append(0.0 if change == 0 else change / size if size else float("inf"))
    return max(float("inf") if change != change else change for change in changes)
