"""Errors and the warning of dybit, and checks of names that users write."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class DyBitError(ValueError):
    """Bad input: one sentence that names the argument and quotes its value."""


class CheckpointError(DyBitError):
    """A checkpoint that is truncated, not written by dybit, of another version, or for another architecture."""


class MissingExtraError(DyBitError, ImportError):
    """An optional dependency that is not installed; the message says what to install."""


class DyBitWarning(UserWarning):
    """Something was left unchanged; the result is still correct."""


def check_keys(what: str, given: Iterable[str], known: Collection[str]) -> None:
    """Checks that every given name is known.

    Raises:
        DyBitError: A name is not known; the message names the nearest one.
    """
    for name in given:
        if name not in known:
            raise DyBitError(f"{what} has the unknown name {name!r}; {suggestion(name, known)}")


def suggestion(name: object, known: Collection[str]) -> str:
    """Returns ``did you mean 'x'?`` with the nearest of the known names, or a list of them if none is near."""
    near = difflib.get_close_matches(str(name), known, 1, 0.4)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
