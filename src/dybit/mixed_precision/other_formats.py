"""Compares the error of a recipe's weights with other formats of the same widths and scales."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.models.plan import weight_spec
from dybit.recipe import LayerRecipe
from dybit.tensors.encoding import quantize

# Formats with a name for every width; shown if they have the widths of the recipe.
_RIVALS = {
    "full DyBit": "s{}",
    "INT": "int{}",
    "NF": "nf{}",
    "flint": "flint{}",
    "ANT": "ant{}",
    "posit, es = 1": "posit{}es1",
    "AdaptivFloat": "adaptivfloat{}",
}


def compare(layers: Iterable[tuple[Tensor, LayerRecipe, int]]) -> list[dict[str, Any]]:
    """Rounds weights to their own formats and to rival ones of the same widths.

    Args:
        layers: Weights with their recipe and ``TensorSpec.transposed``. Weights in floating point are ignored.

    Returns:
        ``name``, ``sqnr`` of all weights together in dB, unweighted, and ``dybit``, whether it is the recipe itself;
        best first.
    """
    formats = {"this recipe": "", **_RIVALS}
    noise = dict.fromkeys(formats, 0.0)
    signal = 0.0
    for weight, recipe, transposed in layers:
        if recipe.weight_family is None:
            continue
        spec = weight_spec(recipe, tuple(weight.shape), transposed)
        signal += float(weight.double().square().sum())
        for name, pattern in list(formats.items()):
            try:
                family = catalogue.family(pattern.format(spec.bits)) if pattern else spec.formats
                own = replace(spec, family=family.name, scale=family.scale or spec.scale)
            except DyBitError:  # no such width, or scales that do not fit these units
                del formats[name]
                continue
            rounded = quantize(weight, own, method=recipe.method, percentile=recipe.percentile)
            noise[name] += float((rounded.dequantize().double() - weight.double()).square().sum())
    found = [
        {"name": name, "sqnr": 10 * math.log10(signal / noise[name]), "dybit": name == "this recipe"}
        for name in formats
        if signal and noise[name]
    ]
    return sorted(found, key=lambda row: -row["sqnr"])
