"""The recipe of an imported file asks for the formats that the file has."""

import torch

from dybit.interchange import Imported
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec


def test_the_recipe_quantizes_to_the_same_specs():
    specs = {
        "a.weight": TensorSpec("s4r2", (4, 64), "group", 32, "pow2", "group"),
        "b.weight": TensorSpec("int4", (4, 64), "channel"),
    }
    weights = {name: quantize(torch.randn(spec.shape), spec) for name, spec in specs.items()}
    recipe = Imported(weights).recipe
    for name, spec in specs.items():
        layer = recipe.layer(name.removesuffix(".weight"))
        assert (layer.weight_family.name, layer.group_size, layer.scale) == (spec.family, spec.group_size, spec.scale)
    assert recipe.layer("other") is None or recipe.layer("other").weights is None


def test_an_empty_file_keeps_floating_point():
    recipe = Imported().recipe
    assert recipe.weights is None and recipe.embeddings is None and not recipe.rules
