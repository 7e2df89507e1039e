"""Blocks: which sequences are found in models, and that running them by themselves is running the model."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dybit.ptq.rounding.blocks import Recording, find, without_cache


class Layer(nn.Module):
    """A block with an argument beside the stream, which returns a tuple."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, factor=1.0, shift=None):
        return None, x + factor * self.down(torch.relu(self.up(x))) + shift


class Model(nn.Module):
    """An embedding, blocks that are fed from one to the next, and a head."""

    def __init__(self, twist=None):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Layer(8) for _ in range(3))
        self.unused = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 10)
        self.twist = twist

    def forward(self, ids):
        x, shift = self.embed(ids), torch.full((8,), 0.1)
        for index, layer in enumerate(self.layers):
            _, x = layer(x, index + 1.0, shift=shift)
            if self.twist == "between":
                x = x * 2
            if self.twist == "again":
                x = layer(x, 1.0, shift=shift)[1]
        return self.head(x)


def sizes(model):
    return {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def names(model, batch):
    return [block.name for block in find(model.eval(), batch, sizes(model))]


IDS = torch.randint(10, (2, 5), generator=torch.Generator().manual_seed(0))


def test_blocks_of_a_model():
    assert names(Model(), IDS) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("twist", ["between", "again"])
def test_no_blocks_where_something_comes_between(twist):
    assert names(Model(twist), IDS) == []


def test_the_smallest_pieces_win():
    part = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model = nn.Sequential(nn.Linear(4, 4), part, nn.Flatten())
    assert names(model, torch.ones(2, 4)) == ["1.0", "1.1", "1.2", "1.3"]


def test_torch_transformers_and_one_layer():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    for layer in encoder.layers:
        layer.activation_relu_or_gelu = 0
    assert names(encoder, torch.randn(2, 3, 8)) == ["layers.0", "layers.1"]
    assert names(nn.Linear(3, 3), torch.ones(1, 3)) == []


def test_blocks_that_remember_are_no_blocks():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    assert names(nn.Sequential(Counting(3, 3), nn.Linear(3, 3)), torch.ones(1, 3)) == []


def test_steps_are_the_model():
    model = Model().eval()
    recording = Recording(find(model, IDS, sizes(model)))
    with recording.capturing(), torch.no_grad():
        expected = [model(IDS), model(IDS + 0)]
    assert len(recording.streams) == 2
    for index in range(3):
        before = list(recording.streams)
        recording.step(index, keep=False)
        assert all(a is b for a, b in zip(before, recording.streams, strict=True))
        recording.step(index, keep=True)
    for stream, wanted in zip(recording.streams, expected, strict=True):
        assert torch.equal(model.head(stream), wanted)
    assert not any(block.module._forward_pre_hooks for block in recording.blocks)


def test_caches_are_off_for_a_while():
    model = nn.Sequential(nn.Linear(2, 2))
    model.config = SimpleNamespace(use_cache=True)
    model[0].config = model.config
    with pytest.raises(KeyError), without_cache(model):
        assert model.config.use_cache is False
        raise KeyError
    assert model.config.use_cache is True
