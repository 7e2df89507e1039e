"""Layouts of tensors in memory."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dybit.runtime.layouts import dense, is_last, merge, rows_of, spread


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


def test_channels_last_in_memory():
    x = torch.randn(2, 3, 4, 5)
    assert is_last(x.to(memory_format=torch.channels_last))
    assert not is_last(x)
    assert is_last(torch.randn(2, 4, 4, 4, 3).permute(0, 4, 1, 2, 3))
    assert not is_last(torch.randn(4, 5))
    assert not is_last(3)


@given(tensors(), st.integers(1, 5))
def test_merged_dimensions_cover_the_same_elements_in_the_order_of_the_last_operand(x, most):
    own = dense(x.shape)
    found = merge(x.shape, [x.stride(), own], most)
    if found is None:
        assert most < x.ndim
        return
    sizes, strides = found
    assert len(sizes) == most
    memory = torch.arange(10_000)
    assert torch.equal(memory.as_strided(sizes, strides[0]).flatten(), memory.as_strided(x.shape, x.stride()).flatten())
    assert torch.equal(memory.as_strided(sizes, strides[1]).flatten(), torch.arange(x.numel()))


@given(tensors())
def test_strides_of_a_broadcast_tensor(x):
    shape = (2, *(n if n > 1 else 3 for n in x.shape))
    assert spread(x, shape) == list(x.expand(shape).stride())
