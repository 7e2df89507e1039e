import copy

import pytest
import torch
from convolutional import images, network, pair
from helpers import build, inputs
from torch import nn

import dybit
from dybit.errors import DyBitWarning
from dybit.layers.quantized import Quantized
from dybit.ptq.corrections.statistics import match_statistics_
from dybit.recipe import Recipe


class Skipping(nn.Module):
    """Different paths for different batches, a layer used twice, and one never."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.never = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        if x.shape[0] > 2:
            return self.first(self.second(x))
        return self.second(self.first(self.first(x)))


def test_layers_never_reached_are_named():
    model = Skipping()
    data = [torch.randn(2, 6), torch.randn(4, 6), torch.randn(2, 6)]
    quantized = dybit.quantize_(copy.deepcopy(model), Recipe(weights=3))
    training = [module.training for module in quantized.modules()]
    with pytest.warns(DyBitWarning, match="never reached 1 layers.*never"):
        match_statistics_(quantized, model, data)
    assert [module.training for module in quantized.modules()] == training
    assert not any(module._forward_pre_hooks for part in (quantized, model) for module in part.modules())


def test_attention_and_tied_weights_stay():
    quantized, reference = pair(build("encoder"), [inputs("encoder")])
    attention = {k: v for k, v in quantized.state_dict().items() if "self_attn" in k}
    with pytest.warns(DyBitWarning, match="out_proj"):
        match_statistics_(quantized, reference, [inputs("encoder")])
    assert all(torch.equal(quantized.state_dict()[k], v) for k, v in attention.items())
    quantized, reference = pair(build("tied"), [inputs("tied")])
    match_statistics_(quantized, reference, [inputs("tied")])
    assert quantized.head.bias is None and quantized.head.weight is not None
    assert isinstance(quantized.head, Quantized)


def test_progress():
    said = []
    quantized, reference = pair(network(), images())
    match_statistics_(quantized, reference, images(), progress=lambda *line: said.append(line))
    assert said == [(0, 4, "0"), (1, 4, "3"), (2, 4, "5"), (3, 4, "9"), (4, 4, "done")]
