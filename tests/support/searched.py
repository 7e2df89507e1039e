"""Small models to search, for several test files; workers import it, so nothing is done at import."""

import torch
from torch import nn


class Net(nn.Module):
    """A convolution with its norm, two layers with one input, attention, a residual block and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)])
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        x = self.query(x) + self.key(x)
        return self.head(self.attention(x, x, x)[0].mean(1))


def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.3, 0.3)
        model.norm.running_var.uniform_(0.5, 1.5)
        model.head.weight.mul_(8)
    return model


def batches(count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 4, 4, generator=generator) for _ in range(count)]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def mlp_batches(split="calibration"):
    generator = torch.Generator().manual_seed(int(split == "evaluation"))
    return [torch.randn(16, 6, generator=generator) for _ in range(2)]


def score(model):
    """Agreement with the original, as an accuracy."""
    exact = mlp()
    with torch.no_grad():
        hits = [model(x).argmax(-1) == exact(x).argmax(-1) for x in mlp_batches("evaluation")]
    return 100 * torch.cat(hits).float().mean().item()


class Poison(nn.Module):
    """Gives NaN as soon as its layer's weights are not what they were."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 4)
        self.kept = nn.Parameter(self.second.weight.detach().clone(), requires_grad=False)

    def forward(self, x):
        y = self.second(self.first(x))
        return y if torch.equal(self.second.weight, self.kept) else y * torch.nan


class Deadly(nn.Module):
    """Ends the process that runs its third batch, unless that is the one that made it."""

    def __init__(self, parent):
        super().__init__()
        self.layer, self.parent, self.calls = nn.Linear(6, 4), parent, 0

    def forward(self, x):
        import os

        self.calls += 1
        if os.getpid() != self.parent and self.calls > 3:
            os._exit(9)
        return self.layer(x)
