"""The table of the coarse search against exact errors, and the scales that it starts from."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dybit.formats import catalogue
from dybit.tensors.coarse_search import coarse_starts, coarse_table, reaches, scale_has_sign

CPU = torch.device("cpu")


def exact_errors(x, book, scales):
    """Squared error of every row at every scale, in float64."""
    ratio = x.double().numpy()[:, None] / np.asarray(scales)[:, None]
    value = book.decode(book.encode(ratio))
    return ((ratio - value) ** 2 * np.asarray(scales)[:, None] ** 2).sum(-1)


@pytest.mark.parametrize("name", ["dybit4", "nf3", "int4asym", "s2mid", "u5"])
def test_errors_of_the_table_are_close_to_exact_ones(name):
    family = catalogue.family(name)
    table, scales = coarse_table(family.books, CPU)
    x = torch.randn(12, 400)
    x /= x.abs().amax(1, keepdim=True)
    found = table.errors(x, None, False).double().numpy()
    weighted = table.errors(x, torch.full_like(x, 3.0), False).double().numpy()
    pooled = table.errors(x, None, True).numpy()
    for book, (first, last) in list(zip(family.books, table.owners, strict=True))[::4]:
        exact = exact_errors(x, book, scales[first:last].double().numpy())
        assert found[:, first:last] == pytest.approx(exact, rel=0.25, abs=2e-3)
        assert pooled[0, first:last] == pytest.approx(exact.sum(0), rel=0.05, abs=1e-2)
    assert weighted == pytest.approx(3 * found, rel=1e-4, abs=1e-6)
    assert pooled[0] == pytest.approx(found.sum(0), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernels_and_torch_start_equally_well(pooled, weighted, request):
    books = catalogue.family("dybit4").books
    x = torch.rand(20, 300) * 2 - 1
    chunks = [(x, torch.rand_like(x) if weighted else None)]
    compiled = coarse_starts(books, chunks, pooled)
    request.getfixturevalue("plain_torch")
    plain = coarse_starts(books, chunks, pooled)
    assert [start.shape for start in compiled] == [start.shape for start in plain]
    same = [(a == b).float().mean().item() for a, b in zip(compiled, plain, strict=True)]
    assert min(same) >= 0.9  # they add up in different orders


def test_short_units_of_many_levels_have_more_starts():
    for name, length, starts in (("int8", 16, 30), ("int8", 300, 1), ("int4", 16, 1)):
        books = catalogue.family(name).books
        (found,) = coarse_starts(books, [(torch.rand(3, length), None)], False)
        assert found.shape == (3, starts)


@pytest.mark.parametrize("name", ["s4", "s8", "nf4", "int4full", "u4"])
def test_reaches(name):
    book = catalogue.family(name).books[0]
    found = reaches(book, 0.5)
    top = float(np.abs(book.levels).max())
    assert found[0] == top and found[1:] == sorted(found[1:])
    assert max(b / a for a, b in pairwise(found[1:])) < 1.04
    middle = np.unique(np.abs(book.levels))
    assert found[1] == middle[len(middle) // 2] and found[-1] >= 2 * top


def test_only_asymmetric_codebooks_with_negative_levels_have_scales_with_a_sign():
    signs = {name: scale_has_sign(catalogue.family(name).books[0]) for name in ("s4", "u4", "s4spare", "int4full")}
    assert signs == {"s4": False, "u4": False, "s4spare": True, "int4full": True}
