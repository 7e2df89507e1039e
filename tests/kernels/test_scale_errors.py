"""The sums of the search for scales against NumPy, on every instruction set and in plain torch."""

import numpy as np
import pytest
import torch

from dybit.formats import catalogue
from dybit.kernels import extension, scale_errors
from dybit.tensors import coarse_search
from kernels import ISAS, by_torch

pytestmark = pytest.mark.skipif(not ISAS, reason="no compiled kernels")


@pytest.mark.parametrize("name", ["s4", "s8r3", "nf4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_a_fit(name, weighted):
    rng = np.random.default_rng(0)
    book = catalogue.family(name).books[0]
    before, results = extension.isa(), []
    for length in (1, 15, 16, 200, 3000):
        x = torch.from_numpy(rng.normal(size=(5, length)).astype(np.float32))
        h = torch.from_numpy(rng.random((5, length)).astype(np.float32)) if weighted else None
        factor = torch.from_numpy(rng.uniform(0.1, 0.5, (5, 1)).astype(np.float32))
        results = []
        for isa in ISAS:
            extension.use(isa)
            results.append(scale_errors.fit(book, x, h, factor))
            assert torch.equal(results[0], results[-1]), isa
        wide, ones = x.double().numpy(), np.ones(x.shape) if h is None else h.double().numpy()
        value = book.values[book.encode((x / factor).numpy())]
        residual = wide - value * factor.double().numpy()
        expected = [(ones * a).sum(1) for a in (residual**2, value * wide, value**2)]
        np.testing.assert_allclose(results[0].numpy(), expected, rtol=1e-4, atol=1e-5)
        plain = by_torch(lambda given=(book, x, h, factor): scale_errors.fit(*given))
        np.testing.assert_allclose(plain.numpy(), expected, rtol=1e-4, atol=1e-4)
    extension.use(before)


@pytest.mark.parametrize("shape", [(3, 7), (100, 40), (20, 900), (2, 5000)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_coarse_search_finds_the_least_sum(shape, weighted):
    torch.manual_seed(0)
    family = catalogue.family("dybit3")
    table, _ = coarse_search.coarse_table(family.books, torch.device("cpu"))
    x = torch.randn(shape)
    x /= x.abs().amax(1, keepdim=True)
    h = torch.rand(shape) if weighted else None
    wide = scale_errors.CoarseTable(table.table.double(), table.owners)
    sums = wide.errors(x, None if h is None else h.double(), False)
    before, found = extension.isa(), []
    for isa in ISAS:
        extension.use(isa)
        found.append(table.search([(x, h)], False, 2))
        assert torch.equal(found[0], found[-1]), isa
    extension.use(before)
    for pairs in (found[0], by_torch(lambda: table.search([(x, h)], False, 2))):
        for book, (first, last) in enumerate(table.owners):
            best = sums[:, first:last].amin(1)
            mine = sums.gather(1, pairs[:, book].long())
            assert bool(((pairs[:, book] >= first) & (pairs[:, book] < last)).all())
            torch.testing.assert_close(mine[:, 0], best, rtol=1e-5, atol=1e-9)
            assert bool((mine[:, 1] >= mine[:, 0] * (1 - 1e-5)).all())
    pooled = sums.sum(0, keepdim=True)
    for whole in (table.search([(x, h)], True, 1), by_torch(lambda: table.search([(x, h)], True, 1))):
        for book, (first, last) in enumerate(table.owners):
            torch.testing.assert_close(
                pooled[0, whole[0, book, 0].long()], pooled[0, first:last].min(), rtol=1e-5, atol=1e-9
            )
