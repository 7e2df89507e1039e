"""Embeddings with sums or means from rows, against torch's own from a table."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dybit
from dybit.layers.bag import bag_of_rows
from dybit.recipe import Recipe


@given(
    st.sampled_from(["sum", "mean", "max"]),
    st.none() | st.integers(0, 6),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.int64, torch.int32]),
    st.integers(0, 99),
)
def test_as_torch_computes(mode, padding, last, weighted, dtype, seed):
    torch.manual_seed(seed)
    bag = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=padding, include_last_offset=last)
    flat = torch.randint(0, 7, (9,), dtype=dtype)
    offsets = torch.tensor([0, 2, 2, 9] if last else [0, 2, 2], dtype=dtype)
    factors = torch.rand(9) if weighted and mode == "sum" else None
    found = bag_of_rows(bag, bag.weight[flat.long()], flat, offsets, factors)
    torch.testing.assert_close(found, bag(flat, offsets, factors))
    if not last:
        square, factors = flat.view(3, 3), None if factors is None else factors.view(3, 3)
        rows = bag.weight[flat.long()]
        torch.testing.assert_close(bag_of_rows(bag, rows, square, None, factors), bag(square, None, factors))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@torch.no_grad()
def test_quantized_looks_up_its_rows_only(mode):
    bag = dybit.quantize_(nn.EmbeddingBag(50, 16, mode=mode), Recipe(), strict=True)
    assert bag.weight_specs["weight"].bits == 8  # a table's width
    index = torch.randint(0, 50, (4, 5))
    expected = nn.functional.embedding_bag(index, bag.weight, mode=mode)
    torch.testing.assert_close(bag(index), expected)
    assert torch.equal(dybit.dequantize_(bag)(index), expected) and type(bag) is nn.EmbeddingBag


def test_factors_learn():
    bag = dybit.quantize_(nn.EmbeddingBag(50, 16, mode="sum"), Recipe())
    factors = torch.rand(4, 5, requires_grad=True)
    bag(torch.randint(0, 50, (4, 5)), per_sample_weights=factors).sum().backward()
    assert factors.grad is not None and bool(factors.grad.any())


def test_a_limited_norm_keeps_floating_point():
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(5, 4, max_norm=1.0), "layer": nn.Linear(4, 4)})
    with pytest.warns(dybit.DyBitWarning, match="layer 'bag' keeps floating point: max_norm"):
        dybit.quantize_(model, Recipe())
    assert type(model["bag"]) is nn.EmbeddingBag
