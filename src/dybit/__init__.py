"""DyBit: variable-length codes of 2 to 8 bits for the weights and activations of PyTorch models.

Names are loaded when they are first used: ``import dybit`` itself loads neither torch nor NumPy. It registers dybit
with transformers, which can be imported before or after.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dybit.accelerator.cost import AcceleratorCost as AcceleratorCost
    from dybit.errors import CheckpointError as CheckpointError
    from dybit.errors import DyBitError as DyBitError
    from dybit.errors import DyBitWarning as DyBitWarning
    from dybit.errors import MissingExtraError as MissingExtraError
    from dybit.formats.format import Format as Format
    from dybit.formats.format import variants as variants
    from dybit.integrations.config import DyBitConfig as DyBitConfig
    from dybit.integrations.decoder_cache import cache as cache
    from dybit.kernels.cache_config import CacheConfig as CacheConfig
    from dybit.mixed_precision.candidate import Candidate as Candidate
    from dybit.mixed_precision.constraint import MaxDrop as MaxDrop
    from dybit.mixed_precision.constraint import MaxError as MaxError
    from dybit.mixed_precision.constraint import MaxSize as MaxSize
    from dybit.mixed_precision.constraint import Speedup as Speedup
    from dybit.mixed_precision.cost import CpuCost as CpuCost
    from dybit.mixed_precision.cost import SizeCost as SizeCost
    from dybit.mixed_precision.search import search as search
    from dybit.models.checkpoint import save as save
    from dybit.models.preparation import dequantize_ as dequantize_
    from dybit.ptq.quantize import quantize_ as quantize_
    from dybit.qat.prepare import convert_ as convert_
    from dybit.qat.prepare import prepare_qat_ as prepare_qat_
    from dybit.recipe import Recipe as Recipe
    from dybit.runtime.fuse import fuse as fuse
    from dybit.runtime.load import load as load

_HOMES = {
    "AcceleratorCost": "accelerator.cost",
    "CacheConfig": "kernels.cache_config",
    "Candidate": "mixed_precision.candidate",
    "CheckpointError": "errors",
    "DyBitConfig": "integrations.transformers",
    "CpuCost": "mixed_precision.cost",
    "DyBitError": "errors",
    "DyBitWarning": "errors",
    "Format": "formats.format",
    "MaxDrop": "mixed_precision.constraint",
    "MaxError": "mixed_precision.constraint",
    "MaxSize": "mixed_precision.constraint",
    "MissingExtraError": "errors",
    "Recipe": "recipe",
    "cache": "integrations.decoder_cache",
    "convert_": "qat.prepare",
    "SizeCost": "mixed_precision.cost",
    "Speedup": "mixed_precision.constraint",
    "dequantize_": "models.preparation",
    "fuse": "runtime.fuse",
    "load": "runtime.load",
    "prepare_qat_": "qat.prepare",
    "quantize_": "ptq.quantize",
    "save": "models.checkpoint",
    "search": "mixed_precision.search",
    "variants": "formats.format",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"dybit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dybit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


import_module("dybit.integrations").watch()
