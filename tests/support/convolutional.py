"""A small convolutional network, quantized, for tests of corrections."""

import copy

import torch
from helpers import LAYERS
from torch import nn

import dybit
from dybit.models.batch_norm import fold_
from dybit.models.preparation import folded_pairs
from dybit.recipe import Recipe

PRODUCTS = [
    name for name in LAYERS if name.startswith(("linear", "conv", "transposed", "transformers")) and "unbat" not in name
]


def network():
    """A small convolutional network, grouped, depthwise and plain, without biases."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1, groups=4, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()


def images(batches=3, size=4):
    torch.manual_seed(1)
    return [torch.randn(size, 3, 12, 12) + 0.3 for _ in range(batches)]


def pair(model, data, **recipe):
    """A quantized copy, and the floating-point model as it was quantized."""
    recipe = Recipe(**{"weights": 3, **recipe})
    quantized = dybit.quantize_(copy.deepcopy(model), recipe, data)
    reference = copy.deepcopy(model)
    fold_(reference, folded_pairs(quantized))
    return quantized, reference


def error(model, reference, data):
    with torch.no_grad():
        return sum(float((model(x) - reference(x)).square().mean()) for x in data)
