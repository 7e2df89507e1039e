"""Shared by the tests of several modules."""

import torch

from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

RECIPES = {
    "mxfp4": {"weights": "s4r2", "group_size": 32, "scale": "pow2"},
    "nvfp4": {"weights": "s4r2", "group_size": 16, "scale": "e4m3"},
}


def weight(kind, rows=5, columns=64, family="s4r2", spread=4.0):
    torch.manual_seed(1)
    fields = RECIPES[kind]
    spec = TensorSpec(family, (rows, columns), "group", fields["group_size"], fields["scale"], "group")
    return quantize(torch.randn(rows, columns) * torch.exp(spread * torch.randn(rows, 1)), spec)


def parts(found):
    """All that a reader found, by name."""
    weights = {name + suffix: part for name, w in found.weights.items() for suffix, part in w.buffers().items()}
    return {**weights, **found.tensors, **{f"{name}, dequantized": w.dequantize() for name, w in found.weights.items()}}
