"""Values as views of buffers, values that are known in advance, and what is left to torch."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dybit.runtime.capture import Shapes, capture
from dybit.runtime.lowering import Lowering, is_last, rows_of


def lowered(forward, *inputs, rules=()):
    model = nn.Module()
    model.forward = forward
    captured = capture(model, inputs, {})
    lowering = Lowering(captured.module.graph, Shapes(captured).infer(list(inputs)), captured.state)
    lowering.run(rules)
    return lowering


@st.composite
def tensors(draw):
    """A tensor of up to four dimensions: permuted, with slices, with expanded dimensions."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    if draw(st.booleans()):
        x = x.permute(draw(st.permutations(range(x.ndim))))
    if draw(st.booleans()):
        x = x[..., : draw(st.integers(1, x.shape[-1]))]
    if draw(st.booleans()):
        x = x[: draw(st.integers(1, x.shape[0]))]
    return x.unsqueeze(0).expand(3, *x.shape) if draw(st.booleans()) else x


@given(tensors())
def test_rows_of_a_tensor_lie_at_one_distance(x):
    rows = rows_of(x)
    offsets = torch.as_strided(torch.arange(10_000), x.shape, x.stride()).reshape(-1, x.shape[-1])
    distances = offsets[1:, 0] - offsets[:-1, 0]
    steps = offsets[:, 1:] - offsets[:, :-1]
    are_rows = bool((steps == 1).all()) and bool((distances == distances[:1]).all())
    assert (rows is not None) == are_rows
    if rows is not None:
        assert rows[0] == len(offsets)
        assert len(distances) == 0 or rows[1] == distances[0]


def test_views_are_no_steps():
    lowering = lowered(lambda x: (x.view(4, 3).t()[1:] * 2.0, x.flatten().unsqueeze(0) + 1.0), torch.randn(2, 6))
    assert [step.name for step in lowering.steps] == ["aten.mul.Tensor", "aten.add.Tensor"]
    view = next(lowering.view(node) for node in lowering.nodes if "slice" in str(node.target))
    assert view.buffer is lowering.inputs[0]
    assert (view.offset, view.nbytes_before, view.is_whole) == (1, 4, False)
    assert (tuple(view.like.shape), view.like.stride()) == ((2, 4), (1, 3))


def test_values_that_depend_on_no_input_are_computed_once():
    lowering = lowered(lambda x: x + torch.arange(6).float().cos() * 2.0, torch.randn(4, 6))
    assert [step.name for step in lowering.steps] == ["aten.add.Tensor"]
    constant = next(b for b in lowering.steps[0].reads if b.constant is not None)
    assert torch.equal(constant.constant, torch.arange(6).float().cos() * 2.0)


def test_random_numbers_are_not_computed_in_advance():
    lowering = lowered(lambda x: x + torch.rand(6), torch.randn(4, 6))
    assert [step.name for step in lowering.steps] == ["aten.rand.default", "aten.add.Tensor"]


def test_operators_of_several_results_and_plain_results():
    lowering = lowered(lambda x: (*x.topk(2), x.shape[0], x.chunk(2, 1)[1] + 0.5), torch.randn(4, 6))
    assert [step.name for step in lowering.steps][:1] == ["aten.topk.default"]
    assert lowering.outputs[2] == 4
    chunk = next(lowering.view(node) for node in lowering.nodes if str(node.target) == "aten.add.Tensor")
    assert chunk.is_whole


def test_copies_need_not_be_made():
    lowering = lowered(lambda x: x.clone().contiguous().view(3, 4).relu(), torch.randn(3, 4))
    relu = next(node for node in lowering.nodes if str(node.target) == "aten.relu.default")
    given = next(node for node in lowering.nodes if node.op == "placeholder")
    assert lowering.source(relu.all_input_nodes[0]) is given
    assert lowering.users(given) == [relu]
    assert [step.name for step in lowering.steps] == ["aten.relu.default"]


def test_the_first_rule_that_applies_counts():
    seen = []

    def rule(answer, tag):
        def apply(node):
            seen.append(tag)
            if answer:
                lowering_of[0].own(node)
            return answer

        return apply

    lowering_of = []
    model = nn.ReLU()
    captured = capture(model, (torch.randn(3),), {})
    lowering = Lowering(captured.module.graph, Shapes(captured).infer([torch.randn(3)]), captured.state)
    lowering_of.append(lowering)
    target = torch.ops.aten.relu.default
    lowering.run([{target: rule(False, 1)}, {target: rule(True, 2)}, {target: rule(True, 3)}])
    assert seen == [1, 2]
    assert not lowering.steps


def test_channels_last_in_memory():
    x = torch.randn(2, 3, 4, 5)
    assert is_last(x.to(memory_format=torch.channels_last))
    assert not is_last(x)
    assert is_last(torch.randn(2, 4, 4, 4, 3).permute(0, 4, 1, 2, 3))
    assert not is_last(torch.randn(4, 5))
    assert not is_last(3)
