"""Values as views of buffers, values that are known in advance, and what is left to torch."""

import torch
from torch import nn

from dybit.runtime.capture import Shapes, capture
from dybit.runtime.lowering import Lowering


def lowered(forward, *inputs, rules=()):
    model = nn.Module()
    model.forward = forward
    captured = capture(model, inputs, {})
    lowering = Lowering(captured.module.graph, Shapes(captured).infer(list(inputs)), captured.state)
    lowering.run(rules)
    return lowering


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
    lowering = lowered(lambda x: x.clone().contiguous().view(3, 4).float().flatten(0, 0).relu(), torch.randn(3, 4))
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


def test_questions_about_sizes_are_no_uses():
    lowering = lowered(lambda x: (y := x.relu()).reshape(y.shape[0], -1), torch.randn(3, 4, 5))
    relu = next(node for node in lowering.nodes if str(node.target) == "aten.relu.default")
    given = next(node for node in lowering.nodes if node.op == "placeholder")
    assert [str(user.target) for user in lowering.users(relu)] == ["aten.reshape.default"]
    assert lowering.users(given) == [relu]
