"""How a model is fused: as a program of an example, or layer by layer."""

import pytest
import torch
from fused_networks import network
from programs import same
from torch import nn

from dybit import Recipe, fuse, quantize_
from dybit.errors import DyBitError, DyBitWarning
from dybit.kernels import extension
from dybit.runtime.image_fusion import Fused
from dybit.runtime.program import FusedProgram

needs_kernels = pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels")


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x, scale=1.0):
        return {"mean": self.linear(x).mean(1) * scale}


@needs_kernels
@pytest.mark.parametrize("example", [torch.randn(2, 5, 8), (torch.randn(2, 5, 8), 2.0), {"x": torch.randn(2, 5, 8)}])
def test_examples(example):
    model = quantize_(Mean().eval(), Recipe(weights=4, activations="int8", activation_mode="dynamic"))
    fused = fuse(model, example)
    assert isinstance(fused, FusedProgram)
    x = torch.randn(3, 7, 8)
    with torch.no_grad():
        same(fused(x), model(x), rtol=1e-6, atol=1e-6)
        same(fused(x, scale=2.0), model(x, scale=2.0), rtol=1e-6, atol=1e-6)
    with pytest.raises(DyBitError, match="model is already fused"):
        fuse(fused, example)


@needs_kernels
def test_bits_of_a_convolutional_network():
    model = network()
    x = torch.randn(2, 3, 19, 17)
    fused = fuse(model, x)
    with torch.no_grad():
        for given in (x, x.to(memory_format=torch.channels_last), torch.randn(3, 3, 24, 20)):
            same(fused(given), model(given))


def test_without_an_example_layers_are_fused():
    assert isinstance(fuse(network()), Fused)


@needs_kernels
def test_what_cannot_be_captured_is_fused_layer_by_layer():
    class Printing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            if float(x.sum()) > 1e9:
                return x
            return self.body(x)

    warned = pytest.warns(DyBitWarning, match="the model is fused layer by layer, since it cannot be captured: ")
    with warned, pytest.raises(DyBitError):  # torch.fx cannot trace it either
        fuse(Printing().eval(), torch.randn(2, 3, 19, 17))


def test_without_kernels_layers_are_fused(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    assert isinstance(fuse(network(), torch.randn(2, 3, 19, 17)), Fused)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (3, "example must be a tensor, a tuple or a mapping, not int"),
        ((torch.randn(2, 5, 8), 1.0, 2.0), "example does not fit the model: too many positional arguments"),
        ({"y": torch.randn(2, 5, 8)}, "example does not fit the model: missing a required argument: 'x'"),
    ],
)
def test_bad_examples(example, message):
    model = quantize_(Mean().eval(), Recipe(weights=4))
    with pytest.raises(DyBitError, match=f"^{message}"):
        fuse(model, example)
