"""Transposed convolutions in programs: the bits of the model."""

import pytest
import torch
from programs import names, same
from torch import nn

from dybit import Recipe, quantize_
from dybit.kernels import extension
from dybit.runtime.program import FusedProgram

pytestmark = pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels")


class Up(nn.Module):
    """A small U: down, up again, and past it."""

    def __init__(self):
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.last = (
            nn.ConvTranspose2d(16, 8, 2, 2),
            nn.ConvTranspose2d(16, 6, 3, 2, 1, output_padding=1, groups=2),
        )
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        y = self.first(x).relu()
        return self.last(torch.cat([self.up(self.deep(self.pool(y)).relu()).relu(), y], 1))


@pytest.mark.parametrize("recipe", [Recipe(weights=4, activations=8), Recipe(weights=3, activations=None)])
def test_an_image_goes_up_again(recipe):
    x = torch.randn(2, 3, 16, 12)
    model = quantize_(Up().eval(), recipe, calibration=[x])
    fused = FusedProgram(model, (x,), {})
    with torch.no_grad():
        for given in (x, x.to(memory_format=torch.channels_last), torch.randn(3, 3, 8, 20), x[:1]):
            same(fused(given), model(given), rtol=1e-5, atol=1e-5)
    assert names(fused, x).count("conv_transposed") == 2


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.ConvTranspose1d(8, 5, 3, 2), (2, 8, 9)), (nn.ConvTranspose3d(8, 5, 2), (2, 8, 3, 4, 2))]
)
def test_other_dimensions(layer, shape):
    x = torch.randn(shape)
    model = quantize_(nn.Sequential(layer).eval(), Recipe(weights=4, activations=8), calibration=[x])
    fused = FusedProgram(model, (x,), {})
    with torch.no_grad():
        same(fused(x), model(x))
    assert names(fused, x) == ["conv_transposed"]


def test_what_is_left_to_torch():
    x = torch.randn(2, 2, 6, 5)
    model = quantize_(
        nn.Sequential(nn.ConvTranspose2d(2, 4, 3)).eval(), Recipe(weights=4, activations=8), calibration=[x]
    )
    fused = FusedProgram(model, (x,), {})
    with torch.no_grad():
        same(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert names(fused, x) == ["torch:dybit.conv_transposed.default"]
