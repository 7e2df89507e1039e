"""Rounding and its gradients, on every instruction set and in plain torch, bit for bit."""

import numpy as np
import pytest
import torch

from dybit.formats import catalogue
from dybit.formats.codebook import Table
from dybit.formats.format import variants
from dybit.kernels import code_operators, extension, rounding
from dybit.tensors import scale_search
from kernels import BOOKS, ISAS, by_torch, hostile

pytestmark = pytest.mark.skipif(not ISAS, reason="no compiled kernels")
ONE = torch.ones(1)
SMALL = {"one_bit": Table("one_bit", [-1.0, 1.0]), "hole": Table("hole", [0.0, np.nan, 1.0, -2.0])}


def test_every_codebook_rounds_as_the_oracle(isa):
    for book in (BOOKS | SMALL).values():
        x = hostile(book)
        found = rounding.fake_quantize(torch.from_numpy(x), ONE, None, book)
        np.testing.assert_array_equal(found.numpy(), book.values[book.encode(x)].astype(np.float32), err_msg=book.name)


@pytest.mark.parametrize("name", ["s4", "u3", "s8", "nf4", "s2mid", "posit8es1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fake_quantize_is_plain_torch(name, dtype, isa):
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 33) * 3).to(dtype)
    x[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    x[1, 2] = 0
    book = catalogue.family(name).books[0]
    scales = (torch.tensor(0.3), torch.tensor([-0.3]), torch.rand(3, 1, 1) + 0.1, torch.rand(5, 1) + 0.1)
    for factor in (*scales, torch.rand(3, 5, 1)):
        for offset in (None, torch.tensor([0.7])):
            expected = by_torch(lambda f=factor, o=offset: rounding.fake_quantize(x, f, o, book))
            found = rounding.fake_quantize(x, factor, offset, book)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())
    for size in (0, 4, 7, 100):
        expected = by_torch(lambda n=size: rounding.fake_quantize_dynamic(x, book, 1.7, n))
        found = rounding.fake_quantize_dynamic(x, book, 1.7, size)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["s4", "u4", "int8", "nf4", "s2mid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_group_that_is_not_finite_becomes_nan(name, dtype, isa):
    book = catalogue.family(name).books[0]
    for bad in (torch.nan, torch.inf, -torch.inf):
        for size in (0, 8, 16):
            x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
            clean = rounding.fake_quantize_dynamic(x, book, 1.7, size)
            x[1, 17] = bad
            found = rounding.fake_quantize_dynamic(x, book, 1.7, size)
            plain = by_torch(lambda x=x, n=size: rounding.fake_quantize_dynamic(x, book, 1.7, n))
            hit = torch.zeros(3, 40, dtype=torch.bool)
            start = 17 // size * size if size else 0
            hit[1, start : start + (size or 40)] = True
            assert torch.equal(found.isnan(), hit) and torch.equal(plain.isnan(), hit)
            assert torch.equal(found[~hit], clean[~hit]) and torch.equal(plain[~hit], clean[~hit])


@pytest.mark.parametrize("name", ["s4", "u4", "s8", "s8r1", "int8", "nf4", "s2mid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.01, 0.4, 0.83, 1.0])
def test_the_largest_numbers_do_not_overflow(name, dtype, share, isa):
    book = catalogue.family(name).books[0]
    most, top = torch.finfo(dtype).max, float(np.abs(book.levels).max())
    x = (torch.rand(4, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * most).to(dtype)
    x[:, 3] = most
    found = rounding.fake_quantize_dynamic(x, book, share * top, 0)
    plain = by_torch(lambda: rounding.fake_quantize_dynamic(x, book, share * top, 0))
    assert torch.isfinite(found).all() and torch.equal(found, plain)
    # In float64 nothing overflows: no scale is worse than that which maps the largest number to the largest value.
    exact = x.double().numpy()
    scale = max(exact.max() / top, np.finfo(np.float32).tiny)
    nearest = book.values[book.encode(exact / scale)] * scale
    assert np.abs(found.double().numpy() - exact).max() <= np.abs(nearest - exact).max() / share + 0.01 * most


def test_what_the_kernels_leave_to_torch():
    book = catalogue.family("s4").books[0]
    x = torch.randn(4, 6)
    given = [(x, f, None) for f in (torch.rand(6), torch.rand(4, 6), torch.ones(1, dtype=torch.float64))]
    for arguments in (*given, (x, torch.ones(1), torch.rand(6)), (x[:0], torch.ones(1), None)):
        found, expected = (call(lambda a=arguments: rounding.fake_quantize(*a, book)) for call in (by_torch, run))
        assert torch.equal(found, expected) and found.shape == arguments[0].shape
    assert torch.equal(
        code_operators.fake_quantize(x, torch.full((6,), 0.5), None, "s4"),
        code_operators.fake_quantize(x, torch.tensor(0.5), None, "s4"),
    )


def run(call):
    return call()


def test_units_of_several_codebooks(isa):
    torch.manual_seed(0)
    books = variants(3)
    for length in (1, 15, 16, 300):
        x, factor = torch.randn(9, length) * 3, torch.rand(9, 1) + 0.1
        x[0, 0], x[1, 0] = torch.nan, torch.inf
        choice = torch.arange(9, dtype=torch.uint8).remainder(len(books))[:, None]
        rows = enumerate(choice.view(-1).tolist())
        expected = torch.stack([rounding.fake_quantize(x[i], factor[i], None, books[c]) for i, c in rows])
        found = rounding.round_chosen(x, factor, choice, books)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        plain = by_torch(lambda x=x, f=factor, c=choice: rounding.round_chosen(x, f, c, books))
        torch.testing.assert_close(plain, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("chosen", [False, True])
def test_gradients_of_rounded_units(chosen):
    torch.manual_seed(0)
    ends = torch.tensor([[-1.75, 1.75], [-2.0, 4.0], [-1.0, 2.5]])
    books = tuple(Table(f"table{i}", pair) for i, pair in enumerate(ends.tolist()))
    before = extension.isa()
    for units, length in ((1, 1), (5, 15), (5, 16), (3, 3000)):
        x, grad, rounded = (torch.randn(units, length) * size for size in (2, 1, 2))
        factor = torch.rand(units if chosen else 1, 1) + 0.2
        choice = torch.arange(units, dtype=torch.uint8).remainder(3)[:, None] if chosen else None
        x[0, 0] = 1.75 * factor[0, 0]  # on the edge, which is inside
        results = []
        for name in ISAS:
            extension.use(name)
            results.append(rounding.pass_through(x, grad, rounded, factor, books, choice))
            assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True)), name
        low, high = (ends[:1] if choice is None else ends[choice.view(-1).long()]).split(1, dim=1)
        kept = torch.where((x / factor >= low) & (x / factor <= high), grad, 0.0)
        assert torch.equal(results[0][0], kept)
        slopes = (grad.double() * rounded - kept.double() * x).sum(1, keepdim=True)
        torch.testing.assert_close(results[0][1].double(), slopes, rtol=1e-4, atol=1e-3)
        given = (x, grad, rounded, factor, books, choice)
        plain = by_torch(lambda given=given: rounding.pass_through(*given))
        assert torch.equal(plain[0], kept)
        torch.testing.assert_close(plain[1].double(), slopes, rtol=1e-4, atol=1e-3)
    extension.use(before)


@pytest.mark.parametrize("offset", [None, -0.6])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "half", "row"])
def test_gradients_of_a_whole_tensor(offset, layout):
    torch.manual_seed(0)
    book, factor = catalogue.family("s4r2").books[0], torch.tensor([0.4])
    given = None if offset is None else torch.tensor([offset])
    x, grad = torch.randn(2, 6, 50) * 2
    if layout == "transposed":
        x, grad = x.T, grad.T
    if layout in ("half", "row"):
        x, grad = (x.bfloat16(), grad.bfloat16()) if layout == "half" else (x[0], grad[0])
    rounded = rounding.fake_quantize(x, factor, given, book)
    ratio = (x.double() - (offset or 0.0)) / factor.double()
    kept = torch.where((ratio >= book.levels[0]) & (ratio <= book.levels[-1]), grad, 0.0)
    clipped = (grad - kept).double().sum()
    slope = (grad.double() * rounded.double() - kept.double() * x.double()).sum() - (offset or 0.0) * clipped
    for call in (run, by_torch):
        found = call(lambda: rounding.pass_through_whole(x, grad, rounded, factor, given, book))
        assert torch.equal(found[0], kept)
        torch.testing.assert_close(found[1].double(), slope.view(1), rtol=1e-3, atol=1e-3)
        if offset is None:
            assert found[2] is None
        else:
            torch.testing.assert_close(found[2].double(), clipped.view(1), rtol=1e-3, atol=1e-3)


def test_threads_give_the_same_bits():
    torch.manual_seed(0)
    x = torch.randn(64, 3000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            chosen = scale_search.choose_scales(x, catalogue.family("dybit3"), granularity="group", group_size=100)
            results.append((chosen.scale, chosen.choice, code_operators.fake_quantize_dynamic(x, "s4", 2.0, 64)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
