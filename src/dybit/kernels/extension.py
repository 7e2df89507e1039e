"""The compiled extension: loads it, and says and chooses which instruction set runs.

Where no extension was built, everything runs on plain torch, and one line says so.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType

from dybit.errors import DyBitError

FALLBACK = "torch"


@cache
def load() -> ModuleType | None:
    """The extension, or None: not built, built for another Python, or switched off with ``DYBIT_ISA=torch``."""
    if os.environ.get("DYBIT_ISA") == FALLBACK:
        return None
    try:
        from dybit.kernels import _kernels
    except ImportError as error:
        logging.getLogger("dybit").warning(
            "dybit runs on plain torch: its compiled kernels cannot be loaded (%s)", error
        )
        return None
    try:
        _kernels.isa()
    except ValueError as error:
        raise DyBitError(f"DYBIT_ISA={os.environ.get('DYBIT_ISA')!r} cannot be used: {error}") from None
    return _kernels


def isa() -> str:
    """The name of the path that runs.

    It is ``amx``, ``avx512``, ``avxvnni`` or ``avx2`` on x86, ``neon-dot`` or ``neon`` on Arm, ``scalar`` elsewhere,
    and ``torch`` without the extension.

    Raises:
        DyBitError: ``DYBIT_ISA`` names one that cannot run here.
    """
    extension = load()
    return extension.isa() if extension else FALLBACK


def available() -> tuple[str, ...]:
    """The paths that can run on this machine, each checked against the scalar one at load; the last is the fastest."""
    extension = load()
    return (FALLBACK, *(extension.available() if extension else ()))


def read_all(address: int, count: int, threads: int) -> None:
    """Reads ``count`` bytes of memory once, as the kernels read weights: for benchmarks.

    Raises:
        DyBitError: There is no extension.
    """
    _needed().read_all(address, count, threads)


def multiply_bytes(count: int, threads: int) -> int:
    """Multiplies bytes in registers alone, with the instruction of the kernels; returns how many products were made.

    Zero where the path has no such instruction. For benchmarks.

    Raises:
        DyBitError: There is no extension.
    """
    return int(_needed().multiply_bytes(count, threads))


def _needed() -> ModuleType:
    extension = load()
    if extension is None:
        raise DyBitError("the compiled extension is needed, but not there")
    return extension


def use(name: str) -> None:
    """Switches to another path, for tests and benchmarks; weights packed for another one are packed anew.

    Raises:
        DyBitError: ``name`` is not in :func:`available`, or is ``torch``, which only ``DYBIT_ISA`` can choose.
    """
    extension = load()
    if extension is None or name not in extension.available():
        raise DyBitError(f"name must be one of {', '.join(available()[1:]) or 'none'}, not {name!r}")
    extension.use(name)
