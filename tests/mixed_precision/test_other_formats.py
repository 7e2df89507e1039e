"""Tests of the comparison of a recipe with other formats at its widths."""

import math

import torch

from dybit.formats import catalogue
from dybit.mixed_precision.other_formats import compare
from dybit.recipe import LayerRecipe
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec


def weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_all_weights_count_together():
    a, b = weight(8, 32, 0), 3 * weight(4, 64, 1)
    found = compare([(a, LayerRecipe(weights=4), 0), (b, LayerRecipe(weights=3), 0), (b, LayerRecipe(weights=None), 0)])
    by_name = {row["name"]: row for row in found}
    noise = sum(
        float((quantize(w, TensorSpec(name, tuple(w.shape))).dequantize() - w).double().square().sum())
        for w, name in ((a, "int4"), (b, "int3"))
    )
    signal = float(a.double().square().sum() + b.double().square().sum())
    assert math.isclose(by_name["INT"]["sqnr"], 10 * math.log10(signal / noise), rel_tol=1e-9)
    assert [row["sqnr"] for row in found] == sorted((row["sqnr"] for row in found), reverse=True)
    assert [row["name"] for row in found if row["dybit"]] == ["this recipe"]
    assert by_name["this recipe"]["sqnr"] >= by_name["full DyBit"]["sqnr"]


def test_formats_without_a_width_are_left_out():
    found = {row["name"] for row in compare([(weight(4, 16, 2), LayerRecipe(weights=2), 0)])}
    assert "INT" in found and "flint" not in found and "ANT" not in found
    assert catalogue.family("nf2").bits == 2 and "NF" in found


def test_nothing_to_compare():
    assert compare([]) == [] and compare([(torch.zeros(2, 4), LayerRecipe(weights=4), 0)]) == []
