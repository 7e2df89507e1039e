"""Small classifiers for the data sets of :mod:`dybit.demo.toy`, each trained in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SignalCNN(nn.Module):
    """A convolutional network with batch norm for MNIST-1D: (batch, 40) to logits (batch, 10).

    Args:
        width: Channels of the first layer; the others have twice as many.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        wide = 2 * width
        self.features = nn.Sequential(
            *_conv_1d(1, width, 5, 1),
            *_conv_1d(width, wide, 3, 2),
            *_conv_1d(wide, wide, 3, 2),
            *_conv_1d(wide, wide, 3, 2),
        )
        self.head = nn.Linear(5 * wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies signals."""
        logits: Tensor = self.head(self.features(x[:, None]).flatten(1))
        return logits


def _conv_1d(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm1d(outputs), nn.ReLU()]


class DigitCNN(nn.Module):
    """A convolutional network with batch norm for 8 x 8 digits: (batch, 64) to logits (batch, 10).

    Args:
        width: Channels of the first layer; the others have twice as many.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        wide = 2 * width
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, width, 1), (width, wide, 2), (wide, wide, 1), (wide, wide, 2)):
            conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(4 * wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies pictures."""
        logits: Tensor = self.head(self.features(x.view(-1, 1, 8, 8)).flatten(1))
        return logits


class DigitViT(nn.Module):
    """A vision transformer for 8 x 8 digits, 16 patches of 2 x 2: (batch, 64) to logits (batch, 10).

    Args:
        dim: Width of a token.
        depth: Transformer layers, with pre-norm and ReLU.
        heads: Attention heads.
    """

    def __init__(self, dim: int = 32, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.position = nn.Parameter(torch.randn(16, dim) * 0.1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies pictures."""
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        tokens = self.embed(patches) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits
