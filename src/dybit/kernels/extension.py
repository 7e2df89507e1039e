"""Loads the compiled extension, and selects the instruction set of its kernels.

Without the extension everything runs in plain torch, with one log message.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType
from typing import Any

from dybit.errors import DyBitError

FALLBACK = "torch"


@cache
def load() -> ModuleType | None:
    """Returns the extension; None if missing, built for another Python, or switched off by ``DYBIT_ISA=torch``."""
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
    """Returns the instruction set in use.

    It is ``amx``, ``avx512``, ``avxvnni`` or ``avx2`` on x86, ``neon-dot`` or ``neon`` on Arm, ``scalar`` elsewhere,
    and ``torch`` without the extension.

    Raises:
        DyBitError: ``DYBIT_ISA`` names an instruction set that cannot run here.
    """
    extension = load()
    return extension.isa() if extension else FALLBACK


def available() -> tuple[str, ...]:
    """Returns the instruction sets that run here, fastest last. Each is checked against the scalar code at load."""
    extension = load()
    return (FALLBACK, *(extension.available() if extension else ()))


def read_all(address: int, count: int, threads: int) -> None:
    """Reads ``count`` bytes of memory once, as the kernels read weights: for benchmarks.

    Raises:
        DyBitError: There is no extension.
    """
    _needed().read_all(address, count, threads)


def multiply_bytes(count: int, threads: int) -> int:
    """Multiplies bytes in registers, with the instruction of the kernels, for benchmarks.

    Returns the number of products; 0 if the instruction set has no such instruction.

    Raises:
        DyBitError: There is no extension.
    """
    return int(_needed().multiply_bytes(count, threads))


def new_program(arena_bytes: int) -> Any:  # noqa: ANN401  # the extension's own class
    """Returns a program without steps, whose runs have so much memory of their own (csrc/program.h).

    The methods that add steps take places and sizes, unchecked. What they refer to must live as long as the program.

    Raises:
        DyBitError: There is no extension.
    """
    return _needed().Program(arena_bytes)


def new_kv_cache(*arguments: Any) -> Any:  # noqa: ANN401  # the extension's own class
    """Returns an empty cache of the keys and values of one attention layer (csrc/module_cache.cc).

    It takes the number of heads, the sizes of keys and values, and what ``CacheConfig.native`` returns. Its methods
    take addresses and indices, unchecked.

    Raises:
        DyBitError: There is no extension.
    """
    return _needed().KVCache(*arguments)


def new_decoder(*arguments: Any) -> Any:  # noqa: ANN401  # the extension's own class
    """Returns a decoder without layers (csrc/decoder.h).

    Its methods take addresses and sizes. What they refer to must live as long as the decoder.

    Raises:
        DyBitError: There is no extension.
    """
    return _needed().Decoder(*arguments)


def left_padding(mask: int, sequences: int, length: int, starts: int) -> bool:
    """Whether each sequence of an int64 mask is zeros and then ones; writes where these begin as int32.

    Raises:
        DyBitError: There is no extension.
    """
    return bool(_needed().left_padding(mask, sequences, length, starts))


def _needed() -> ModuleType:
    extension = load()
    if extension is None:
        raise DyBitError("the compiled extension is needed, but is not installed")
    return extension


def use(name: str) -> None:
    """Switches to another instruction set, for tests and benchmarks. Packed weights are packed again.

    Raises:
        DyBitError: ``name`` is not in :func:`available`, or is ``torch``, which only ``DYBIT_ISA`` can choose.
    """
    extension = load()
    if extension is None or name not in extension.available():
        raise DyBitError(f"name must be one of {', '.join(available()[1:]) or 'none'}, not {name!r}")
    extension.use(name)
