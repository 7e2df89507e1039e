"""Planned memory, the order of steps, blocks of rows, and results of their own."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import images, rows, same
from torch import nn

from dybit.kernels import extension
from dybit.runtime import plan
from dybit.runtime.capture import capture
from dybit.runtime.lowering import Buffer, Step
from dybit.runtime.plan import _groups, _place
from dybit.runtime.program import FusedProgram, lower

pytestmark = pytest.mark.filterwarnings("ignore:calibration never reached")
needs_kernels = pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels")


@st.composite
def programs(draw):
    """Steps that each write a buffer and read some earlier ones."""
    buffers, steps = [], []
    for i in range(draw(st.integers(1, 12))):
        reads = draw(st.lists(st.sampled_from(buffers), max_size=3)) if buffers else []
        buffers.append(Buffer(draw(st.integers(1, 1000))))
        emit = (lambda program, at: None) if draw(st.booleans()) else None
        steps.append(Step(str(i), None, tuple(reads), (buffers[-1],), emit, i))
    return steps, buffers


@given(programs())
def test_buffers_that_are_needed_at_the_same_time_do_not_overlap(program):
    steps, buffers = program
    offsets, total = _place([[step] for step in steps], set(buffers))
    needed = {b: [i for i, step in enumerate(steps) if b in (*step.reads, *step.writes)] for b in buffers}
    for b in buffers:
        assert offsets[b] % 64 == 0
        assert offsets[b] + b.nbytes <= total
        for other in buffers:
            apart = needed[b][-1] < needed[other][0] or needed[other][-1] < needed[b][0]
            disjoint = offsets[b] + b.nbytes <= offsets[other] or offsets[other] + other.nbytes <= offsets[b]
            assert b is other or apart or disjoint
    assert total <= sum(b.nbytes + 128 for b in buffers)


def test_memory_is_used_again():
    buffers = [Buffer(1 << 20) for _ in range(10)]
    steps = [Step(str(i), None, (buffers[i],), (buffers[i + 1],)) for i in range(9)]
    _, total = _place([[step] for step in steps], set(buffers))
    assert total < 2.1 * (1 << 20)


@given(programs())
def test_steps_run_after_those_that_they_need(program):
    steps, _ = program
    groups = _groups(steps)
    order = [step for group in groups for step in group]
    assert sorted(order, key=steps.index) == steps
    written = set()
    for step in order:
        assert written.issuperset(step.reads)
        written.update(step.writes)
    for group, following in itertools.pairwise(groups):
        assert len({step.emit is None for step in group}) == 1
        assert (group[0].emit is None) != (following[0].emit is None)


@needs_kernels
@pytest.mark.parametrize("block", [24, 96, 384])
def test_blocks_of_rows_give_the_same_bits(monkeypatch, block):
    monkeypatch.setattr(plan, "_LEAST_ROWS", 1 << 30)
    model, (x, mask) = rows(4, "dynamic")
    x, mask = x.repeat(1, 25, 1)[:, :211], mask.repeat(1, 25)[:, :211]
    whole = FusedProgram(model, (x, mask), {})
    with torch.no_grad():
        expected = whole(x, mask)
    for name, value in (("_LEAST_ROWS", 2), ("_LEAST_BLOCK", block), ("_MOST_BLOCK", block)):
        monkeypatch.setattr(plan, name, value)
    with torch.no_grad():
        same(FusedProgram(model, (x, mask), {})(x, mask), expected)


@needs_kernels
def test_results_share_no_memory():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x):
            y = x * 2.0
            return x, x.t(), y, y[1:], self.weight, y.view(-1), self.weight * 3

    model = Net().eval()
    x = torch.randn(3, 4)
    fused = FusedProgram(model, (x,), {})
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            results = fused(x)
            same(results, expected)
            for result in results:  # what a caller writes reaches nobody
                result.fill_(7.0)
    assert len({result.untyped_storage().data_ptr() for result in results}) == len(results)


@needs_kernels
def test_times_of_all_steps():
    model, inputs = images(3)
    fused = FusedProgram(model, inputs, {})
    shares = fused.report(*inputs).shares
    assert all(share.seconds >= 0 for share in shares)
    assert {share.kernel for share in shares} == {True, False}
    assert all(share.where for share in shares)


@needs_kernels
def test_planned_memory_is_smaller_than_all_values():
    model = nn.Sequential(*(nn.Sequential(nn.Hardswish(), nn.Sigmoid()) for _ in range(8))).eval()
    x = torch.randn(64, 1024)
    assert 0 < lower(capture(model, (x,), {}), [x]).arena_bytes <= 2 * (x.nbytes + 128)
