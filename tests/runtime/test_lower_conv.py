"""Convolutions in programs: what they take up, and that their bits are those of the model."""

from dataclasses import replace

import pytest
import torch
from programs import RECIPE, names, same
from torch import nn
from torch.nn import functional

from dybit import Recipe, quantize_
from dybit.kernels import extension
from dybit.runtime.program import FusedProgram

ISAS = extension.available()[1:]
pytestmark = [
    pytest.mark.filterwarnings("ignore:calibration never reached"),
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels"),
]


class Net(nn.Module):
    def __init__(self, forward, channels=6):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.point, self.deep = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, groups=channels)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def check(forward, steps, recipe=RECIPE):
    """Compares a program with its model, and its steps with those expected."""
    x = torch.randn(2, 6, 8, 7).abs()
    model = quantize_(Net(forward).eval(), recipe, calibration=[x, -x])
    fused = FusedProgram(model, (x,), {})
    with torch.no_grad():
        for given in (x, x.to(memory_format=torch.channels_last), torch.randn(3, 6, 12, 9)):
            same(fused(given), model(given))
    if steps is not None:
        assert names(fused, x) == steps


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa):
    extension.use(isa)
    check(
        lambda m, x: m.deep(functional.relu6(m.point(x)) + x) * 2.0,
        ["round", "conv", "add", "round", "depthwise", "mul"],
    )


@pytest.mark.parametrize("format", ["int8", "dybit8", "s8r2", "uint8", "dybit4"])
def test_input_formats(format):
    steps = ["round", "conv", "conv"] if format in ("int8", "s8r2") else None
    check(lambda m, x: m.b(m.a(x).relu()).relu(), steps, replace(RECIPE, activations=format))


def test_additions_and_clamps():
    check(lambda m, x: (x + m.a(x)).clamp(max=1.0), ["round", "conv"])
    check(lambda m, x: functional.hardtanh(m.b(m.a(x)) + m.c(x), -0.5, 0.5), ["round", "conv", "conv", "conv"])
    check(lambda m, x: m.a(x) + 1.0, ["round", "conv", "add"])
    check(lambda m, x: m.a(x) + x.amax((2, 3), keepdim=True), ["torch:aten.amax.default", "round", "conv", "add"])
    check(lambda m, x: (m.a(x) + m.a(x)).relu(), ["round", "conv", "conv"])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("function", [functional.silu, functional.hardswish, functional.gelu])
def test_activations_are_taken_up_and_leave_an_offset(function, isa):
    extension.use(isa)
    recipe = Recipe(weights=4, activations=8)
    x = torch.randn(2, 6, 8, 7)
    model = Net(lambda m, x: function(m.deep(function(m.a(x)))) + function(m.c(x + m.b(x)))[..., 1:-1, 1:-1]).eval()
    quantize_(model, recipe, calibration=[x])
    assert model.deep.input_spec.offset
    fused = FusedProgram(model, (x,), {})
    assert names(fused, x) == ["round", "conv", "depthwise", "conv", "conv", "add"]
    with torch.no_grad():
        for given in (x, torch.randn(3, 6, 12, 9)):
            one, other = fused(given), model(given)
            torch.testing.assert_close(one, other, rtol=0.0, atol=0.02 * float(other.abs().amax()))
            assert (one - other).abs().mean() < 1e-4
    two = quantize_(Net(lambda m, x: (y := function(m.a(x))) * y.mean((2, 3), True)).eval(), recipe, calibration=[x])
    assert names(FusedProgram(two, (x,), {}), x) == ["round", "conv", "mean", "mul"]


def test_what_is_used_twice_is_not_taken_up():
    def forward(m, x):
        y = m.a(x)
        return y.relu() + y, m.b(y)

    check(forward, ["round", "conv", "relu", "add", "conv"])


def test_convolutions_share_a_rounded_image():
    check(lambda m, x: (m.a(x), m.b(x), m.point(x)), ["round", "conv", "conv", "conv"])


def test_padding_becomes_a_border():
    check(lambda m, x: m.deep(functional.pad(m.a(x), (1, 0, 2, 1))), ["round", "conv", "depthwise"])
    check(
        lambda m, x: m.deep(functional.pad(m.a(x), (1, 0, 2, 1), value=0.5)),
        ["round", "conv", "torch:aten.pad.default", "round", "depthwise"],
    )


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(6, 5, 3, padding=2, dilation=2), (2, 6, 9)),
        (lambda: nn.Conv3d(6, 5, 2, stride=2), (2, 6, 5, 4, 6)),
        (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 7)),
        (lambda: nn.ConvTranspose2d(6, 4, 3), (2, 6, 5, 7)),
    ],
)
def test_other_convolutions(make, shape):
    x = torch.randn(shape)
    model = quantize_(nn.Sequential(make(), nn.ReLU()).eval(), RECIPE, calibration=[x])
    fused = FusedProgram(model, (x,), {})
    by_torch = isinstance(model[0], nn.ConvTranspose2d)  # whose sums in FP32 have another order than the kernels'
    with torch.no_grad():
        same(fused(x), model(x), atol=2e-6 if by_torch else 0.0)


@pytest.mark.parametrize("mode", ["dynamic", None])
def test_other_inputs(mode):
    recipe = (
        Recipe(weights=4, method="absmax", activations=None) if mode is None else replace(RECIPE, activation_mode=mode)
    )
    x = torch.randn(2, 6, 8, 7)
    model = quantize_(Net(lambda m, x: m.b(m.a(x).relu())).eval(), recipe, calibration=None if mode else [x])
    fused = FusedProgram(model, (x,), {})
    with torch.no_grad():
        same(fused(x), model(x))
