"""Captured graphs: for which inputs they hold, what cannot be captured, and the shapes that they predict."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from dybit.runtime.capture import CaptureError, Shapes, capture, shares_memory


class Net(nn.Module):
    """An image and a number, a dictionary of results."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x, *, factor=2.0):
        y = self.conv(x)
        return {"y": y * factor + self.shift, "mean": y.mean((2, 3)), "flat": y.flatten(1)}


NET = Net().eval()
CAPTURED = capture(NET, (torch.randn(2, 3, 9, 8),), {"factor": 2.0})


def test_the_graph_computes_what_the_model_does():
    x = torch.randn(5, 3, 12, 7)
    with torch.no_grad():
        results = pytree.tree_unflatten(pytree.tree_leaves(CAPTURED.module(x)), CAPTURED.out_spec)
        expected = NET(x, factor=2.0)
    assert all(torch.equal(results[name], value) for name, value in expected.items())
    assert set(CAPTURED.names()) == {"conv.weight", "conv.bias", "shift"}
    assert CAPTURED.out_spec.num_leaves == 3


@settings(max_examples=15)
@given(st.integers(2, 9), st.integers(3, 30), st.integers(3, 30), st.booleans(), st.booleans())
def test_shapes_are_those_of_a_run(batch, height, width, prefer_last, last):
    x = torch.randn(batch, 3, height, width)
    x = x.to(memory_format=torch.channels_last) if last else x
    values = Shapes(CAPTURED, prefer_last).infer([x])
    output = next(node for node in CAPTURED.module.graph.nodes if node.op == "output")
    with torch.no_grad():
        expected = NET(x, factor=2.0)
    for node, result in zip(output.args[0], expected.values(), strict=True):
        assert values[node].shape == result.shape
        assert prefer_last or values[node].stride() == result.stride()
    conv = next(value for node, value in values.items() if "conv2d" in str(node.target))
    assert conv.is_contiguous(memory_format=torch.channels_last) or not (prefer_last or last)


def test_a_graph_that_does_not_hold_is_refused():
    class Even(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] % 2 else x + 1

    captured = capture(Even(), (torch.randn(4, 3),), {})
    assert Shapes(captured).infer([torch.randn(6, 3)])
    with pytest.raises(CaptureError):
        Shapes(captured).infer([torch.randn(5, 3)])


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x):
        self.count += 1
        return x + self.count


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2)


@pytest.mark.parametrize(
    ("model", "match"),
    [(Written(), "writes to 'count'"), (Branching(), "."), (InPlace(), "writes to one of its inputs")],
)
def test_what_cannot_be_captured(model, match):
    with pytest.raises(CaptureError, match=match) as error:
        capture(model, (torch.randn(4, 2),), {})
    assert len(str(error.value).splitlines()) == 1


def test_a_view_is_captured_as_any_tensor():
    captured = capture(NET, (torch.randn(4, 3, 12, 20)[1:3, :, ::2, 3:],), {"factor": 2.0})
    x = torch.randn(2, 3, 8, 8)
    assert Shapes(captured).infer([x])


def test_arguments_by_position_name_and_star():
    class Many(nn.Module):
        def forward(self, a, *rest, last, **more):
            return a + sum(rest) * last - more["other"]

    given = (
        (torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)),
        {"last": torch.ones(4), "other": torch.randn(3, 4)},
    )
    captured = capture(Many(), *given)
    tensors = [*given[0], *given[1].values()]
    assert torch.equal(captured.module(*tensors), Many()(*given[0], **given[1]))


def test_views_share_memory():
    x = torch.randn(4, 4)
    assert shares_memory(x, x[1:].t())
    assert not shares_memory(x, x.clone())
    assert not shares_memory(x, 3)


def in_place(x):
    y = x + 1.0
    return torch.relu_(y).mul_(2.0), y


def through_a_view(x):
    y = x * 1.0
    view = y.view(-1)
    view.clamp_(0.0, 0.5)
    return y + 1.0


def before_a_view_is_read(x):
    y = x * 1.0
    parts = y.chunk(2, 1)
    y.neg_()
    return parts[0] + 1.0


def into_a_part(x):
    y = x + 0.0
    y[0] = 1.0
    return y


def in_another_type(x):
    return (x > 0).float().add_(x.double())


def under_other_modes(x):
    with torch.autocast("cpu", enabled=False):
        y = x.float().cos()
    return y.relu_() + x


@pytest.mark.parametrize(
    "function", [under_other_modes, in_place, through_a_view, before_a_view_is_read, into_a_part, in_another_type]
)
def test_graphs_write_to_nothing(function):
    model = nn.Module()
    model.forward = function
    captured = capture(model, (torch.randn(3, 4),), {})
    targets = [node.target for node in captured.module.graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, torch._ops.OpOverload) or target.__module__ == "_operator" for target in targets)
    assert not [target for target in targets if getattr(target, "_schema", None) and target._schema.is_mutable]
    x = torch.randn(5, 4)
    expected = function(x.clone())
    for one, other in zip(*map(pytree.tree_leaves, (captured.module(x), expected)), strict=True):
        assert torch.equal(one, other)


def test_operators_in_place_need_no_second_trace(monkeypatch):
    def refuse(*args):
        raise AssertionError("traced again")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(True), nn.Hardswish(True), nn.Flatten()).eval()
    captured = capture(model, (torch.randn(2, 3, 4, 4),), {})
    x = torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(captured.module(x), model(x))
