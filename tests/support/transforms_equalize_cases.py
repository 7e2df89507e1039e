"""Shared by the tests of several modules."""

import torch
from torch import nn


def names(model):
    return [name for name, _ in model.named_modules()]


def mobile(activation=nn.ReLU6):
    """Convolution, depthwise convolution, convolution, with channels of very different ranges, and a classifier."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), activation(), nn.Conv2d(16, 16, 3, padding=1, groups=16),
        activation(), nn.Conv2d(16, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    ).eval()  # fmt: skip
    spread = torch.logspace(-1.5, 1.5, 16)
    with torch.no_grad():
        for conv, factor in ((model[0], spread), (model[2], spread.flip(0)[torch.randperm(16)])):
            conv.weight.mul_(factor.view(-1, 1, 1, 1))
        model[4].weight.mul_(3)
    return model


IMAGES = [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(i)) * 2 for i in range(3)]
