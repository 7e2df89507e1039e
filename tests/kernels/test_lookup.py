"""Codebooks as tables for torch against the NumPy oracle, bit for bit."""

import numpy as np
import pytest
import torch

from dybit.formats import catalogue
from dybit.kernels import lookup
from kernels import BOOKS, hostile

CPU = torch.device("cpu")


@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
def test_lookup_equals_the_oracle(book):
    x = hostile(book)
    table = lookup.Lookup(book, torch.device("cpu"))
    codes = book.encode(x)
    given = torch.from_numpy(x)
    assert np.array_equal(table.encode(given).numpy(), codes)
    assert np.array_equal(table.round(given).numpy(), book.values[codes].astype(np.float32))
    assert np.array_equal(table.levels.numpy()[table.nearest(given).numpy()], book.values[codes].astype(np.float32))


@pytest.mark.parametrize("name", ["s4", "nf4"])
def test_lookup_takes_any_layout(name):
    book = BOOKS[name]
    table = lookup.lookup(book, torch.device("cpu"))
    assert table is lookup.lookup(book, torch.device("cpu"))
    x = torch.randn(6, 4, 2)
    for view in (x, x.permute(2, 0, 1), x[::2, 1:], x[:1].expand(3, 4, 2), x[:0], torch.tensor(0.3)):
        assert np.array_equal(table.encode(view).numpy(), book.encode(view.numpy()))
        assert table.round(view).shape == view.shape


@pytest.mark.parametrize("family", ["dybit3", "dybit4", "int4asym", "nf4", "adaptivfloat4"])
def test_several_codebooks_at_once(family):
    books = catalogue.family(family).books
    table = lookup.chosen_lookup(books, CPU)
    assert table is lookup.chosen_lookup(books, CPU)
    choice = torch.arange(3 * len(books)).remainder(len(books))[:, None]
    x = torch.randn(len(choice), 50) * 3
    expected = [books[c].decode(books[c].encode(row)) for c, row in zip(choice[:, 0].tolist(), x.numpy(), strict=True)]
    assert np.array_equal(table.round(x, choice).numpy(), np.stack(expected).astype(np.float32))
    ends = lookup.level_ends(books, CPU).numpy()
    assert np.array_equal(ends, np.float32([(book.levels.min(), book.levels.max()) for book in books]))
