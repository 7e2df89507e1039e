"""Memory formats of fused models: code that depends on them sees those of the model."""

import pytest
import torch
from fused_networks import RECIPES
from torch import nn

from dybit import fuse, quantize_
from dybit.runtime.memory_format import format_like

READERS = {
    "output": lambda y: y,
    "view": lambda y: y.view(y.size(0), -1),
    "view_of_sum": lambda y: (y + 1).view(y.shape[0], -1),
    "view_of_pool": lambda y: nn.functional.max_pool2d(y, 2).view(y.size(0), -1),
    "stride": lambda y: y.mean(0) * y.stride(1),
    "mean": lambda y: y.mean((2, 3)),
    "pool": lambda y: nn.functional.adaptive_avg_pool2d(y, 1).flatten(1),
    "written": lambda y: (y.flatten(1).mul_(2), y)[1].sum((1, 2)),
}


class Reading(nn.Module):
    def __init__(self, reader):
        super().__init__()
        self.a, self.b, self.reader = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 7, 1), reader

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        return self.reader(torch.relu(y))


@pytest.mark.parametrize("reader", READERS)
def test_the_format_is_that_of_the_model(reader):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 4)
    model = quantize_(Reading(READERS[reader]).eval(), RECIPES["int8"], calibration=[x])
    fused = fuse(model)
    assert fused.fused == 1
    given = [x] if reader.startswith("view") else [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:1]]
    with torch.no_grad():
        for x in given:
            found, expected = fused(x), model(x)
            assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_values_stay_channels_last_where_nothing_depends_on_it():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.pool, self.b, self.head = (
                nn.Conv2d(5, 8, 1),
                nn.MaxPool2d(2),
                nn.Conv2d(8, 8, 1),
                nn.Linear(48, 3),
            )

        def forward(self, x):
            y = self.pool(torch.relu(self.a(x)))
            y = torch.relu(self.b(y) + y)
            return self.head(torch.flatten(y, 1))

    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 4)
    model = quantize_(Pooled().eval(), RECIPES["int8"], calibration=[x])
    fused = fuse(model)
    convolutions = [node for node in fused.graph.graph.nodes if str(node.target).startswith("conv_")]
    assert len(convolutions) == 2 and all(node.args[2] is None for node in convolutions)
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))


def test_format_like():
    y = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert format_like(y, torch.empty(1, 2, 3, 3)).is_contiguous()
    assert format_like(y, torch.empty(1, 2, 3, 3).to(memory_format=torch.channels_last)) is y
    line = torch.randn(2, 4, 3).transpose(1, 2)
    assert format_like(line, torch.empty(2, 5, 6)).is_contiguous()
