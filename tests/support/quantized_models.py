"""Every kind of layer, quantized by recipes of every kind."""

import warnings

import pytest
from helpers import LAYERS, build, inputs

from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

RECIPES = {
    "w4": Recipe(weights=4, embeddings=4),
    "w3_groups": Recipe(weights=3, embeddings=3, group_size=5, scale="bf16", variants="all"),
    "w2_tensor": Recipe(weights=2, embeddings=2, granularity="tensor", scale="pow2"),
    "w8a8": Recipe(weights=8, activations=8),
    "w8a8_static": Recipe(weights=8, variants="plain", activations="dybit8plain", activation_mode="static"),
    "w5a6_offset": Recipe(
        weights=5, activations=6, group_size=8, variant_granularity="tensor", activation_mode="static"
    ),
    "w4a8_dynamic": Recipe(weights=4, activations="dybit8plain", activation_mode="dynamic"),
    "w6a4_dynamic_groups": Recipe(weights=6, activations=4, activation_mode="dynamic", activation_group_size=3),
    "a8": Recipe(weights=None, embeddings=None, activations=8, activation_mode="static"),
    "int8_nf4": Recipe(weights="nf4", embeddings="int4asym", activations="int8", activation_mode="static"),
}
RECURRENT = ("lstm", "gru", "rnn", "cells")
each_layer = pytest.mark.parametrize("name", LAYERS)
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def quantized(name, recipe):
    """A quantized model, or None where the recipe leaves nothing to do."""
    model = build(name)
    if recipe.weights is None and name.startswith(("embedding", "bag", *RECURRENT)):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tied weight of which one use is kept
        return quantize_(model, recipe, [inputs(name, seed) for seed in (5, 6)])
