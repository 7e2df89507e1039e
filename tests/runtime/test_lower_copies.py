"""Copies, conversions, concatenation and look-ups as kernels."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import RECIPE, check, names, same
from torch import nn

from dybit import quantize_
from dybit.kernels import extension
from dybit.runtime.program import FusedProgram

pytestmark = pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels")


@pytest.mark.parametrize("dim", [1, 3, -1])
def test_concatenation(dim):
    x = torch.randn(2, 3, 5, 4)
    for other in (x, x.to(memory_format=torch.channels_last)):
        check(lambda a, b: torch.cat([a, b[:, :, :5], a * 1.0], dim), x, other, rtol=0, atol=0)


def test_copies_into_another_layout():
    x = torch.randn(2, 3, 4, 5, 6)
    check(lambda x: x.permute(4, 2, 0, 3, 1).contiguous(), x, steps=["copy"], rtol=0, atol=0)
    check(lambda x: x.transpose(1, 3).reshape(2, 5, -1), x, steps=["copy"], rtol=0, atol=0)
    check(lambda x: x.transpose(0, 1).contiguous(), torch.arange(60).view(3, 4, 5), steps=["copy"])  # integers too


TYPES = [torch.float32, torch.int64, torch.int32, torch.bool]


@pytest.mark.parametrize("before", TYPES)
@pytest.mark.parametrize("after", TYPES)
def test_conversions(before, after):
    x = torch.tensor([[0, 1, -2], [3, 1 << 20, 0]])
    x = x + 0.75 * (x != 0) if before is torch.float32 else x.to(before)
    steps = ["convert"] if before != after else []
    check(lambda x: x.to(after), x, steps=steps, rtol=0, atol=0)
    check(lambda x: x.t().to(after).contiguous(), x, rtol=0, atol=0)


@settings(max_examples=20)
@given(st.data())
def test_elements_at_even_distances_are_copied(data):
    """The mask of a padded batch by positions, as transformers writes it."""
    mask = torch.rand(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))) > 0.5
    step, start = data.draw(st.integers(1, 2)), data.draw(st.integers(0, mask.shape[1] - 1))
    check(
        lambda m: m[torch.arange(m.shape[0])[:, None, None], torch.arange(start, m.shape[1], step)],
        mask,
        steps=["copy"],
    )
    check(lambda m: m[torch.arange(m.shape[0])], mask, steps=["copy"])


def test_other_indices_are_left_to_torch():
    x = torch.randn(4, 6)
    left = ["torch:aten.index.Tensor"]
    check(lambda x: x[torch.tensor([0, 1, 3])], x, steps=left)
    check(lambda x: x[torch.tensor([3, 2, 1])], x, steps=left)
    check(lambda x: x[:, torch.tensor([0, 2])], x, steps=left)
    check(lambda x: x[torch.tensor([-3, -2])], x, steps=["copy"])
    check(lambda x, i: x[i], x, torch.tensor([0, 1]), steps=left)


def test_masks_that_are_true_everywhere():
    mask = torch.rand(2, 1, 1, 5) > 0.3
    check(
        lambda m: (m & torch.ones(4, 1, dtype=torch.bool)).expand(2, 1, 4, 5).float(), mask, steps=["copy", "convert"]
    )
    check(lambda m: torch.ones((), dtype=torch.bool).logical_and(m), mask, steps=["copy"])
    check(lambda m: m & torch.tril(torch.ones(5, 5, dtype=torch.bool)), mask, steps=["torch:aten.__and__.Tensor"])
    check(lambda a: a & 3, torch.arange(4), steps=["torch:aten.__and__.Scalar"])


class Words(nn.Module):
    """The sum of three tables, as in BERT."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(50, 24), nn.Embedding(20, 24), nn.Embedding(2, 24)
        self.norm, self.out = nn.LayerNorm(24), nn.Linear(24, 8)

    def forward(self, index, kinds):
        places = torch.arange(index.shape[1])
        return self.out(self.norm(self.words(index) + self.kinds(kinds) + self.places(places)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("kept", [[], ["words", "places"]])
def test_sums_of_embeddings(dtype, kept):
    index = torch.randint(0, 50, (3, 7)).to(dtype)
    given = index, (index % 2).t().contiguous().t()
    recipe = replace(RECIPE, rules=dict.fromkeys(kept))
    model = quantize_(Words().eval(), recipe, calibration=[given])
    fused = FusedProgram(model, given, {})
    with torch.no_grad():
        for size in ((3, 7), (5, 4), (1, 1), (0, 3)):
            some = torch.randint(0, 50, size).to(dtype), torch.randint(0, 2, size).to(dtype)
            same(fused(*some), model(*some), 1e-5, 1e-5)
        assert not [name for name in names(fused, *given) if name.startswith("torch")]
        with pytest.raises(IndexError):
            fused(index + 50, given[1])
