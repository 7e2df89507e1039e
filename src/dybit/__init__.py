"""DyBit: variable-length codes of 2 to 8 bits for the weights and activations of PyTorch models.

Names are loaded when they are first touched: ``import dybit`` itself loads neither torch nor NumPy. It makes dybit
known to transformers, where that is imported before or after.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dybit.accelerator.cost import AcceleratorCost as AcceleratorCost
    from dybit.allocation import search as search
    from dybit.candidate import Candidate as Candidate
    from dybit.checkpoint import load as load
    from dybit.checkpoint import save as save
    from dybit.constraint import MaxDrop as MaxDrop
    from dybit.constraint import MaxError as MaxError
    from dybit.constraint import MaxSize as MaxSize
    from dybit.constraint import Speedup as Speedup
    from dybit.cost import CpuCost as CpuCost
    from dybit.cost import SizeCost as SizeCost
    from dybit.errors import CheckpointError as CheckpointError
    from dybit.errors import DyBitError as DyBitError
    from dybit.errors import DyBitWarning as DyBitWarning
    from dybit.errors import MissingExtraError as MissingExtraError
    from dybit.format import Format as Format
    from dybit.format import variants as variants
    from dybit.fusion import fuse as fuse
    from dybit.integrations.transformers import DyBitConfig as DyBitConfig
    from dybit.model import dequantize_ as dequantize_
    from dybit.model import quantize_ as quantize_
    from dybit.qat import convert_ as convert_
    from dybit.qat import prepare_qat_ as prepare_qat_
    from dybit.recipe import Recipe as Recipe

_HOMES = {
    "AcceleratorCost": "accelerator.cost",
    "Candidate": "candidate",
    "CheckpointError": "errors",
    "DyBitConfig": "integrations.transformers",
    "CpuCost": "cost",
    "DyBitError": "errors",
    "DyBitWarning": "errors",
    "Format": "format",
    "MaxDrop": "constraint",
    "MaxError": "constraint",
    "MaxSize": "constraint",
    "MissingExtraError": "errors",
    "Recipe": "recipe",
    "convert_": "qat",
    "SizeCost": "cost",
    "Speedup": "constraint",
    "dequantize_": "model",
    "fuse": "fusion",
    "load": "checkpoint",
    "prepare_qat_": "qat",
    "quantize_": "model",
    "save": "checkpoint",
    "search": "allocation",
    "variants": "format",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"dybit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dybit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


import_module("dybit.integrations").watch()
