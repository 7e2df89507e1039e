"""The numbers that each type of scale holds, and their storage."""

import math

import torch

from dybit.tensors.encoding import encode_matrix
from dybit.tensors.quantized_tensor import TensorSpec
from dybit.tensors.scale_search import Scales
from dybit.tensors.scale_types import nearest_scale


def test_nearest_scales():
    scale = torch.tensor([1.0, 1.4, 1.42, -0.3, 3e-40, math.nan])
    assert nearest_scale(scale, "pow2")[:4].tolist() == [1, 1, 2, -0.25]
    assert torch.equal(nearest_scale(scale, "bf16")[:4], scale[:4].bfloat16().float())
    factor = torch.tensor([0.01])
    assert torch.equal(
        nearest_scale(scale[:4], "e4m3", factor), (scale[:4] / 0.01).to(torch.float8_e4m3fn).float() * 0.01
    )
    assert torch.equal(nearest_scale(scale, "fp32")[:4], scale[:4]) and nearest_scale(scale, "fp32")[4] == 2.0**-126
    for kind in ("fp32", "bf16", "pow2", "e4m3"):
        assert nearest_scale(scale, kind).isnan().tolist() == [False] * 5 + [True]


def test_every_power_of_two_survives_storage():
    exponents = torch.arange(-64, 64)
    for sign in (1.0, -1.0):
        scale = (sign * torch.pow(2.0, exponents.double())).float()[:, None]
        spec = TensorSpec("s4r2spare", (128, 1), scale="pow2")
        made = encode_matrix(torch.zeros(128, 1), spec, Scales(scale, None, 1.0, 0.0))
        assert torch.equal(made.scales(), scale)
