"""Checking of names that users write: what is unknown is an error that suggests the nearest known name.

Must not know what the names stand for.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from dybit.errors import DyBitError


def check_keys(what: str, given: Iterable[str], known: Collection[str]) -> None:
    """Checks that every given name is known.

    Raises:
        DyBitError: A name is not known; the message names the nearest one.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise DyBitError(f"{what} has the unknown name {name!r}; {hint}")
