"""Writes in place between convolutions: through views, arguments and augmented assignments."""

import pytest
import torch
from fused_networks import RECIPES
from torch import nn
from torch.nn import functional

from dybit import fuse, quantize_

WRITES = {
    "slice": lambda m, h, x: h[:, :4].zero_(),
    "view": lambda m, h, x: h.view(-1).mul_(3),
    "flatten": lambda m, h, x: h.flatten(1).mul_(3),
    "transpose": lambda m, h, x: h.transpose(2, 3).mul_(3),
    "part": lambda m, h, x: h.chunk(2, 1)[0].zero_(),
    "view_of_view": lambda m, h, x: h.mT.unflatten(1, (2, 4))[:, 1].neg_(),
    "out": lambda m, h, x: torch.mul(h, 3, out=h),
    "out_of_a_view": lambda m, h, x: torch.add(x, x, out=h[:]),
    "positional_out": lambda m, h, x: functional.normalize(h, 2.0, 1, 1e-12, h),
    "function": lambda m, h, x: functional.threshold_(h, 1.0, 9.0),
    "list": lambda m, h, x: torch._foreach_mul_([h], 2.0),
    "inplace": lambda m, h, x: functional.relu6(h[:, :3], inplace=True),
    "positional_inplace": lambda m, h, x: functional.dropout(h, 0.5, True, True).zero_(),
    "data": lambda m, h, x: h.data.mul_(2),
    "storage": lambda m, h, x: h.untyped_storage().fill_(0),
    "numpy": lambda m, h, x: h.numpy().fill(3),
    "operator": lambda m, h, x: h.__imul__(3),
    "module": lambda m, h, x: m.silu(h[:, :4]),
    "item": lambda m, h, x: h.__setitem__((slice(None), 0), 5.0),
}


class Written(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.silu, self.act = nn.SiLU(inplace=True), nn.ReLU(inplace=True)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


def assert_equal(forward, fused=None):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    model = quantize_(Written(forward).eval(), RECIPES["int8"], calibration=[x.clone()])
    found = fuse(model)
    assert fused is None or found.fused == fused
    with torch.no_grad():
        for given in (x, torch.where(x > 1.5, torch.nan, x)):
            one, other = given.clone(), given.clone()
            torch.testing.assert_close(found(one), model(other), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:fuse found nothing")
@pytest.mark.parametrize("write", WRITES)
def test_writes_between_convolutions(write):
    def forward(m, x):
        h = torch.relu(m.a(x))
        WRITES[write](m, h, x)
        return m.b(h)

    assert_equal(forward)


@pytest.mark.filterwarnings("ignore:fuse found nothing")
def test_augmented_assignments():
    def other_name(m, x):
        g = h = torch.relu(m.a(x))
        g += 1
        return m.b(h)

    def view(m, x):
        h = torch.relu(m.a(x))
        h[:, :4] *= 2
        h[:, 5] = 1.0
        h.data += 1
        return m.b(h)

    def addend(m, x):
        g = h = torch.sigmoid(x)
        g += m.a(x)
        return m.b(h)

    def number(m, x):
        n = count = x.size(0)
        n += 3
        return m.b(torch.relu(m.a(x))) * n * count

    for forward in (other_name, view, addend, number):
        assert_equal(forward)


@pytest.mark.filterwarnings("ignore:fuse found nothing")
def test_writes_to_inputs_before_and_after_a_convolution():
    def after(m, x):
        y = m.a(x)
        x.flatten().mul_(0)
        return m.b(torch.relu(y + x))

    def before(m, x):  # NaN runs the model again, on the inputs as they were
        x.sub_(0.25)
        return m.b(torch.relu(m.a(x)))

    def padded(m, x):
        h = functional.pad(torch.relu(m.a(x)), (1, 1))
        h[:, 1:].mul_(2)
        return m.b(h)

    for forward in (after, before, padded):
        assert_equal(forward)


def test_harmless_writes_are_fused():
    def rectified(m, x):
        return m.b(m.act(m.a(x)))

    def residual(m, x):
        y = m.act(m.a(x))
        y += x
        return m.b(m.act(m.a(m.act(y))))

    def sum_in_the_way_around(m, x):
        x = torch.sigmoid(x)
        x += m.a(x)
        return m.b(m.act(x))

    for forward in (rectified, residual, sum_in_the_way_around):
        assert_equal(forward, fused=1)
