"""ONNX: quantized models as files for other runtimes, integer models of others as recipes, and FP32 in other runtimes.

Names are loaded when they are first touched; they need ``pip install "dybit[onnx]"``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dybit.errors import MissingExtraError

if TYPE_CHECKING:
    from dybit.onnx.peers import Peers as Peers
    from dybit.onnx.reader import read as read
    from dybit.onnx.writer import Exported as Exported
    from dybit.onnx.writer import export as export

PRESETS = ("portable", "fast-cpu", "fp4")
_HOMES = {"Exported": "writer", "Peers": "peers", "export": "writer", "read": "reader"}
_NEEDED = {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}
__all__ = ["PRESETS", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dybit.onnx' has no attribute {name!r}")
    try:
        return getattr(import_module(f"dybit.onnx.{_HOMES[name]}"), name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        raise MissingExtraError(f'ONNX needs the package {error.name!r}: pip install "dybit[onnx]"') from None


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
