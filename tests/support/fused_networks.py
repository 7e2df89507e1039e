"""Shared by the tests of several modules."""

import torch
from torch import nn
from torch.nn import functional

from dybit import Recipe, quantize_

RECIPES = {
    "int8": Recipe(
        weights=4, activations="int8", activation_mode="static", method="absmax", activation_method="absmax"
    ),
    "dybit8": Recipe(weights=4, activations="dybit8plain", activation_mode="static", method="absmax"),
    "w8a6": Recipe(weights="dybit8plain", activations=6, activation_mode="static", method="absmax"),
}


class Net(nn.Module):
    """What convolutional networks are made of: ways around, depthwise layers, paddings, shared inputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, 2, 1), nn.Identity(), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(2, 1)
        self.expand, self.expanded = nn.Conv2d(20, 48, 1, bias=False), nn.ReLU6()
        self.pad, self.depthwise = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(48, 48, 3, groups=48)
        self.project = nn.Conv2d(48, 20, 1)
        self.left, self.right = nn.Conv2d(20, 24, 3, 2, 1), nn.Conv2d(20, 24, 1, 2)
        self.grouped = nn.Conv2d(24, 18, (3, 1), padding=(1, 0), groups=2)
        self.reflect = nn.Conv2d(18, 18, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(18, 10)

    def forward(self, x):
        x = self.pool(self.stem(x))
        y = self.pad(functional.pad(self.expanded(self.expand(x)), (1, 0, 1, 0)))
        y = functional.hardtanh(self.depthwise(y), 0.0, 4.0)
        y = self.project(y)
        y += x
        z = torch.relu(self.left(y) + self.right(y))
        z = self.grouped(z).clamp(min=-1.0)
        z = torch.sigmoid(self.reflect(z)) * z
        return self.head(z.mean((2, 3)))


def network(recipe="int8", seed=0):
    torch.manual_seed(seed)
    model = Net().eval()
    return quantize_(model, RECIPES[recipe], calibration=[torch.randn(4, 3, 19, 17)])
