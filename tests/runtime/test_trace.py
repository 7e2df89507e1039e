"""Traces: the graph of what a model writes in place computes what the model computes."""

import torch
from torch import fx, nn

from dybit.runtime.trace import Tracer, is_bare


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.hooked = nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())
        self.hooked.register_forward_hook(lambda module, args, y: y * 2)

    def forward(self, x):
        y = z = x + 1
        z *= 3
        y[:, 0] = 7.0
        y[1:] -= 2
        y.data = y.data / 2
        n = rows = x.size(0)
        n += 1
        return self.hooked(self.inner(y)) * n - rows


def test_writes_in_place_are_traced():
    model, x = Writes(), torch.randn(3, 4)
    tracer = Tracer()
    graph = fx.GraphModule(model, tracer.trace(model))
    given = x.clone()
    assert torch.equal(graph(given), model(x)) and torch.equal(given, x)
    assert tracer.entered == [model.inner]


def test_hooks_and_replaced_forwards_are_not_bare():
    layer = nn.Linear(2, 2)
    assert is_bare(layer)
    handle = layer.register_forward_hook(lambda *args: None)
    assert not is_bare(layer)
    handle.remove()
    assert is_bare(layer)
    layer.forward = lambda x: x
    assert not is_bare(layer)
