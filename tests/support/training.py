"""Short trainings of small models."""

import torch
from torch import nn

from dybit import Recipe

RECIPES = {
    "w4a4": Recipe(weights=4, activations=4, activation_mode="static"),
    "w3_groups": Recipe(weights=3, embeddings=3, group_size=5, scale="bf16", variants="all"),
    "w2_tensor": Recipe(weights=2, embeddings=2, granularity="tensor", scale="pow2", variants="all"),
    "w4_e4m3": Recipe(
        weights="nf4", embeddings=4, group_size=8, scale="e4m3", activations="int4", activation_mode="static"
    ),
    "w5a6_dynamic": Recipe(weights=5, activations=6, variant_granularity="tensor", activation_mode="dynamic"),
}


def train(model, batches, lr=1e-2):
    """A few steps on any output; returns the optimizer."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(*batch).float().square().mean().backward()
        optimizer.step()
    model.eval()
    return optimizer


def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def batches(count, size=8, features=12):
    generator = torch.Generator().manual_seed(11)
    return [(torch.randn(size, features, generator=generator),) for _ in range(count)]
