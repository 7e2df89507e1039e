"""Rows of the table of layers."""

import math

import pytest
import torch
from torch import nn

from dybit import Recipe, quantize_
from dybit.cli.layer_table import Watch, row
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec


def test_a_row_counts_codebooks_and_measures_the_error():
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    stored = quantize(weight, TensorSpec("dybit4", (64, 32)))
    made = row("a", stored, weight, None)
    noise = float((stored.dequantize() - weight).square().sum() / weight.square().sum())
    assert made.sqnr == pytest.approx(-10 * math.log10(noise), rel=1e-5)
    counts = torch.bincount(stored.choices().flatten().long(), minlength=9)
    assert dict(made.shares) == {
        stored.spec.formats.books[i].name: int(n) / 64 for i, n in enumerate(counts.tolist()) if n
    }
    assert [share for _, share in made.shares] == sorted((share for _, share in made.shares), reverse=True)
    assert row("a", stored, None, None).sqnr is None


def test_a_watch_has_a_row_for_every_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    watch = Watch(model, None)
    quantize_(model, Recipe(weights=4), progress=watch)
    assert [one.name for one in watch.rows] == ["0", "2"] and all(one.sqnr > 10 for one in watch.rows)
