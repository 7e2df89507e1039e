"""Constraints of a search: speed, size, error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dybit.errors import DyBitError


@dataclass(frozen=True)
class Speedup:
    """Requires a speedup over the base of the cost; the error is minimised.

    Args:
        times: The smallest speedup, above 0.
    """

    times: float

    def __post_init__(self) -> None:
        """Checks the number."""
        _check(self, "times", self.times, 0.0)


@dataclass(frozen=True)
class MaxSize:
    """Limits the size of a checkpoint's tensors; the error is minimised.

    Args:
        nbytes: The largest number of bytes, above 0.
    """

    nbytes: float

    def __post_init__(self) -> None:
        """Checks the number."""
        _check(self, "nbytes", self.nbytes, 0.0)


@dataclass(frozen=True)
class MaxError:
    """Limits the model's measured error (``Judge``); the cost is minimised.

    Args:
        error: The largest KL divergence in nats for logits, else energy of the error over that of the outputs; above 0.
    """

    error: float

    def __post_init__(self) -> None:
        """Checks the number."""
        _check(self, "error", self.error, 0.0)


@dataclass(frozen=True)
class MaxDrop:
    """Limits the points that the model loses against the original; the cost is minimised.

    Args:
        points: The largest loss, at least 0, in the unit of ``evaluate``.
        evaluate: Takes a model and returns a score, larger being better, such as accuracy in percent. None for the
            agreement with the original in percent: the same largest logit, or the same nearest neighbour.
    """

    points: float
    evaluate: Callable[[Any], float] | None = None

    def __post_init__(self) -> None:
        """Checks the number."""
        _check(self, "points", self.points, -1e-12)
        if self.evaluate is not None and not callable(self.evaluate):
            raise DyBitError(f"evaluate must be a function of a model, not {self.evaluate!r}")


Constraint = Speedup | MaxSize | MaxError | MaxDrop


def as_constraints(given: object) -> tuple[Constraint, ...]:
    """Reads one constraint or several.

    Raises:
        DyBitError: ``given`` is empty, has two of one kind, or has an item of another type.
    """
    items = tuple(given) if isinstance(given, tuple | list) else (given,)
    for item in items:
        if not isinstance(item, Speedup | MaxSize | MaxError | MaxDrop):
            raise DyBitError(f"constraint must be Speedup, MaxSize, MaxError or MaxDrop, not {item!r}")
    if not items:
        raise DyBitError("constraint must be at least one of Speedup, MaxSize, MaxError and MaxDrop")
    kinds = [type(item) for item in items]
    if len(set(kinds)) < len(kinds):
        raise DyBitError(f"constraint has two of one kind: {', '.join(kind.__name__ for kind in kinds)}")
    if MaxError in kinds and MaxDrop in kinds:
        raise DyBitError("MaxError and MaxDrop both limit the loss: give one of them")
    return items


def _check(owner: object, name: str, value: object, low: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low < value < math.inf:  # type: ignore[operator]
        raise DyBitError(f"{name} of {type(owner).__name__} must be a number above {max(low, 0):g}, not {value!r}")
