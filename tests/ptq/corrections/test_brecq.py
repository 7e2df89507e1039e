import copy
import math

import pytest
import torch
from convolutional import error, pair
from helpers import build, decoder, inputs
from torch import nn

import dybit
from dybit.errors import DyBitError
from dybit.layers.quantized import quantized_layers
from dybit.ptq.corrections import brecq
from dybit.ptq.corrections.adaround import adaround_
from dybit.ptq.corrections.brecq import brecq_, find_blocks


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.depthwise = nn.Sequential(nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels))
        self.project = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x, scale=1.0):
        return x + scale * self.project(torch.relu(self.depthwise(torch.relu(self.expand(x)))))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.stages = nn.ModuleList([nn.Sequential(Residual(4), Residual(4))])
        self.head = nn.Linear(4, 6)

    def forward(self, x):
        x = self.stem(x)
        for block in self.stages[0]:
            x = block(x, scale=0.5)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return [torch.randn(8, 3, 11, 11) for _ in range(2)]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(brecq, "_STEPS", 40)


def test_blocks(network):
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    found = find_blocks(network, names)
    assert list(found) == ["stages.0.0", "stages.0.1"]
    assert found["stages.0.1"] == [f"stages.0.1.{part}" for part in ("expand", "depthwise.0", "project")]
    assert find_blocks(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), ["0", "1"]) == {}


@pytest.mark.parametrize("recipe", [{}, {"activations": 8}, {"weights": "nf4", "group_size": 4}, {"scale": "pow2"}])
def test_error_falls(network, data, recipe):
    quantized, reference = pair(network, data, **recipe)
    adaround_(quantized, reference, data)
    before = error(quantized, reference, data)
    assert brecq_(quantized, reference, data) is quantized
    assert error(quantized, reference, data) < before
    assert not any("forward" in vars(layer) for layer in quantized_layers(quantized).values())
    assert not any(parameter.grad is not None for parameter in quantized.parameters())


def test_a_block_that_got_worse_is_left(network, data, monkeypatch):
    monkeypatch.setattr(brecq, "_FINE_RATE", 10.0)
    quantized, reference = pair(network, data)
    before = quantized.stages.state_dict()
    brecq_(quantized, reference, data)
    after = quantized.stages.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_convolutions_learn_with_channels_last(network, data):
    quantized, reference = pair(network, data, activations=8)
    seen = []

    def hook(module, args):
        if torch.is_grad_enabled():
            seen.append(args[0].is_contiguous(memory_format=torch.channels_last))

    for block in quantized.stages[0]:
        block.project.register_forward_pre_hook(hook)
    brecq_(quantized, reference, data)
    assert seen == [True] * (2 * brecq._STEPS)


def test_transformer_layers(data):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x, *, mask):
            return (x + self.down(torch.nn.functional.gelu(self.up(x))) * mask,)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleList([Layer(), Layer()])

        def forward(self, x):
            for layer in self.layer:
                (x,) = layer(x, mask=torch.ones(1))
            return x

    data = [torch.randn(4, n, 8) for n in (5, 7)]
    quantized, reference = pair(Encoder(), data, activations=8)
    before = error(quantized, reference, data)
    brecq_(quantized, reference, data)
    assert error(quantized, reference, data) < before


def test_a_cache_among_the_arguments_changes_nothing(monkeypatch):
    """Transformers' layers append to the cache that they are given."""
    monkeypatch.setattr(brecq, "_STEPS", 20)
    found = []
    for cache in (True, False):
        model = decoder()
        model.config.use_cache = cache
        ids = torch.arange(24).view(2, 12)
        dybit.quantize_(model, dybit.Recipe(weights=3), [{"input_ids": ids}], algorithm=["adaround", "brecq"])
        with torch.no_grad():
            found.append(model(ids, use_cache=False).logits)
    assert torch.equal(*found)


def test_checkpoint(network, data, tmp_path):
    model = dybit.quantize_(copy.deepcopy(network), dybit.Recipe(weights=3), data, algorithm=["adaround", "brecq"])
    dybit.save(model, tmp_path / "model")
    assert torch.equal(dybit.load(tmp_path / "model", Network())(data[0]), model(data[0]))


def test_rejects(network, data):
    quantized, reference = pair(network, data)
    with pytest.raises(DyBitError, match="NaN"):
        brecq_(quantized, reference, [data[0] * math.nan])
    with pytest.raises(DyBitError, match="yields no batch"):
        brecq_(quantized, reference, [])


def test_layers_without_blocks(data):
    quantized, reference = pair(nn.Sequential(build("linear")), [inputs("linear")])
    brecq_(quantized, reference, [inputs("linear")])
    assert error(quantized, reference, inputs("linear")) < 1
