"""Runs the command line in this process, and a model that its tests quantize."""

import os
import subprocess
import sys

from typer.testing import CliRunner

from dybit.cli import app


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


MODULE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 10)).eval()

def data(split="calibration"):
    torch.manual_seed(split == "evaluation")
    return [torch.randn(16, 24) for _ in range(4)]

def plain(): return data("evaluation")

class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()
    def forward(self, x):
        return nn.functional.normalize(self.inner(x), dim=-1)

def unit(): return Unit().eval()
def wrong(): return [torch.ones(2, 3)]
def other(): return nn.Linear(3, 3)
def overflow():
    model = net()
    with torch.no_grad():
        model[2].bias.fill_(3e38).mul_(2)
    return model
"""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dybit", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def good(*words):
    result = invoke(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout
