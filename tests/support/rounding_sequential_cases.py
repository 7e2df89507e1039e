"""Shared by the tests of several modules."""

import torch
from torch import nn


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 6)).eval()


def mixed(*shape, count=3, seed=0):
    """Batches whose last dimension is correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[-1], shape[-1], generator=generator)
    return [torch.randn(*shape, generator=generator) @ mix for _ in range(count)]
