"""How well formats fit weights: SQNR, bits and the bound of single tables."""

import math

import pytest
import torch

from dybit.formats import catalogue
from dybit.measure.format_ranking import Setting, measure
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec


def test_sqnr_and_bits_of_a_format():
    matrix = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    setting = Setting("group", 16, "bf16", "mse")
    found = {item.family.name: item for item in measure([matrix], [catalogue.family("dybit4")], setting, 4)}
    one = found["dybit4"]
    assert one.scale_bits == 1.0 and one.choice_bits == 4 / 16 and one.bits == 5.25

    values = quantize(matrix, TensorSpec("dybit4", (8, 64), "group", 16, "bf16", "group")).dequantize()
    expected = 10 * math.log10(float(matrix.square().sum() / (values - matrix).square().sum()))
    assert one.sqnr == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_lloyd_max_is_above_every_single_table(granularity):
    matrix = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)) ** 3  # heavy tails
    size = 64 if granularity == "group" else None
    setting = Setting(granularity, size, "fp32", "mse")
    families = [catalogue.family(name) for name in ("nf4", "int4", "s4", "s4r2mid", "e2m1", "pot4")]
    results = measure([matrix], families, setting, 4)
    assert results[0].kind == "bound"
