"""The compiled kernels on codes against the NumPy oracle and plain torch, bit for bit on each instruction set."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dybit.errors import DyBitError
from dybit.formats import catalogue, packing
from dybit.formats.codebook import Table
from dybit.formats.format import variants
from dybit.kernels import code_operators, codes, extension
from dybit.tensors import coarse_search, scale_search

ISAS = extension.available()[1:]
pytestmark = pytest.mark.skipif(not ISAS, reason="no compiled kernels")
exact = settings(derandomize=True, deadline=None, max_examples=10)
BOOKS = {
    book.name: book
    for bits in range(2, 9)
    for signed in (True, False)
    for book in (*variants(bits, signed), *(b for f in catalogue.families(bits, signed) for b in f.books))
}
BOOKS |= {"wide": Table("wide", [0.0, 2.0**-120, 1.0, 2.0**100]), "inexact": Table("inexact", [-0.7, 0.1, 0.3, np.pi])}
BOOKS |= {"one_bit": Table("one_bit", [-1.0, 1.0]), "hole": Table("hole", [0.0, np.nan, 1.0, -2.0])}


@pytest.fixture(params=ISAS)
def isa(request):
    before = extension.isa()
    extension.use(request.param)
    yield request.param
    extension.use(before)


def hostile(book):
    """Every level and midpoint with its neighbours, random numbers, and the extremes of float32."""
    points = np.concatenate((book.levels, book.midpoints, np.random.default_rng(0).normal(size=99))).astype(np.float32)
    info = np.finfo(np.float32)
    far = np.array([info.max, -info.max, np.inf, -np.inf, 0.0, -0.0, info.tiny, info.smallest_subnormal], np.float32)
    inf = np.float32(np.inf)
    return np.concatenate((points, np.nextafter(points, -inf), np.nextafter(points, inf), far))


def test_every_codebook_rounds_as_the_oracle(isa):
    one = torch.ones(1, 1)
    for book in BOOKS.values():
        x = hostile(book)
        expected = book.encode(x)
        given = torch.from_numpy(x)
        found = codes.fake_quantize(given, torch.ones(1), None, book)
        np.testing.assert_array_equal(found.numpy(), book.values[expected].astype(np.float32), err_msg=book.name)
        packed = codes.encode(given[None], one, None, [book], None)
        np.testing.assert_array_equal(packed.numpy(), packing.pack(expected[None], book.bits), err_msg=book.name)


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
            expected = code_operators._scaled_round(x, factor, offset, name)
            found = codes.fake_quantize(x, factor, offset, book)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())
    for size in (0, 4, 7, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codes, "fake_quantize_dynamic", lambda *_: None)
            expected = code_operators._fake_quantize_dynamic(x, name, 1.7, size)
        found = codes.fake_quantize_dynamic(x, book, 1.7, size)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_what_the_kernels_leave_to_torch():
    book = catalogue.family("s4").books[0]
    x = torch.randn(4, 6)
    for factor in (torch.rand(6), torch.rand(4, 6), torch.ones(1, dtype=torch.float64), torch.ones(1, 1, 1)):
        assert codes.fake_quantize(x, factor, None, book) is None
    assert codes.fake_quantize(x, torch.ones(1), torch.rand(6), book) is None
    assert codes.fake_quantize(x[:0], torch.ones(1), None, book) is None
    assert torch.equal(
        code_operators.fake_quantize(x, torch.full((6,), 0.5), None, "s4"),
        code_operators.fake_quantize(x, torch.tensor(0.5), None, "s4"),
    )


@pytest.mark.parametrize("bits", range(2, 9))
@exact
@given(st.integers(0, 2**32 - 1))
def test_packed_codes_and_their_values(bits, seed):
    rng = np.random.default_rng(seed)
    books = variants(bits)
    rows, columns = int(rng.integers(1, 6)), int(rng.integers(1, 600))
    size = [None, 1, 5, 16, 128, 300, 700][rng.integers(7)]
    groups = -(-columns // size) if size else 1
    shape = (int(rng.choice([1, rows])), int(rng.choice([1, groups])))
    factor = rng.normal(size=shape).astype(np.float32)
    choice = rng.integers(0, len(books), shape).astype(np.uint8)
    x = rng.normal(size=(rows, columns)).astype(np.float32)

    def spread(units):
        wide = np.repeat(units, size or columns, axis=1)[:, :columns] if units.shape[1] > 1 else units
        return np.broadcast_to(wide, x.shape)

    ratio, expected = x / spread(factor), np.empty(x.shape, np.uint8)
    values = np.empty(x.shape, np.float32)
    for index, book in enumerate(books):
        mine = spread(choice) == index
        expected[mine] = book.encode(ratio[mine])
        values[mine] = book.values[expected[mine]]
    given_scale, given_choice = torch.from_numpy(factor), torch.from_numpy(choice)
    before = extension.isa()
    for name in ISAS:
        extension.use(name)
        packed = codes.encode(torch.from_numpy(x), given_scale, given_choice, books, size)
        np.testing.assert_array_equal(packed.numpy(), packing.pack(expected, bits, size))
        found = codes.decode(packed, given_scale, given_choice, books, columns, size)
        np.testing.assert_array_equal(found.numpy(), values * spread(factor))
    extension.use(before)


def test_a_choice_beyond_the_codebooks_is_refused():
    packed, x = torch.zeros(1, 4, dtype=torch.uint8), torch.ones(1, 8)
    choice, scale, books = torch.full((1, 1), 9, dtype=torch.uint8), torch.ones(1, 1), variants(4)
    for call in (
        lambda: codes.decode(packed, scale, choice, books, 8, None),
        lambda: codes.encode(x, scale, choice, books, None),
        lambda: codes.round_chosen(x, scale, choice, books),
        lambda: codes.pass_through(x, x, x, scale, torch.ones(9, 2), choice),
    ):
        with pytest.raises(DyBitError, match="choice must be below 9, the number of codebooks, but holds 9"):
            call()


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
            results.append(codes.fit(book, x, h, factor))
            assert torch.equal(results[0], results[-1]), isa
        wide, ones = x.double().numpy(), np.ones(x.shape) if h is None else h.double().numpy()
        value = book.values[book.encode((x / factor).numpy())]
        residual = wide - value * factor.double().numpy()
        expected = [(ones * a).sum(1) for a in (residual**2, value * wide, value**2)]
        np.testing.assert_allclose(results[0].numpy(), expected, rtol=1e-4, atol=1e-5)
    extension.use(before)


def test_units_of_several_codebooks(isa):
    torch.manual_seed(0)
    books = variants(3)
    for length in (1, 15, 16, 300):
        x, factor = torch.randn(9, length) * 3, torch.rand(9, 1) + 0.1
        x[0, 0], x[1, 0] = torch.nan, torch.inf
        choice = torch.arange(9, dtype=torch.uint8).remainder(len(books))[:, None]
        expected = torch.cat([codes.fake_quantize(x[i : i + 1], factor[i : i + 1], None, books[c]) if length >= 8 else
                              codes.fake_quantize(x[i], factor[i], None, books[c])[None]
                              for i, c in enumerate(choice.view(-1).tolist())])  # fmt: skip
        found = codes.round_chosen(x, factor, choice, books)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("chosen", [False, True])
def test_gradients_of_rounded_units(chosen):
    torch.manual_seed(0)
    ends = torch.tensor([[-1.75, 1.75], [-2.0, 4.0], [-1.0, 2.5]])
    before = extension.isa()
    for units, length in ((1, 1), (5, 15), (5, 16), (3, 3000)):
        x, grad, rounded = (torch.randn(units, length) * size for size in (2, 1, 2))
        factor = torch.rand(units if chosen else 1, 1) + 0.2
        choice = torch.arange(units, dtype=torch.uint8).remainder(3)[:, None] if chosen else None
        x[0, 0] = 1.75 * factor[0, 0]  # on the edge, which is inside
        results = []
        for name in ISAS:
            extension.use(name)
            results.append(codes.pass_through(x, grad, rounded, factor, ends, choice))
            assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True)), name
        low, high = (ends[:1] if choice is None else ends[choice.view(-1).long()]).split(1, dim=1)
        kept = torch.where((x / factor >= low) & (x / factor <= high), grad, 0.0)
        assert torch.equal(results[0][0], kept)
        slopes = (grad.double() * rounded - kept.double() * x).sum(1, keepdim=True)
        torch.testing.assert_close(results[0][1].double(), slopes, rtol=1e-4, atol=1e-3)
    extension.use(before)


@pytest.mark.parametrize("shape", [(3, 7), (100, 40), (20, 900), (2, 5000)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_coarse_search_finds_the_least_sum(shape, weighted):
    torch.manual_seed(0)
    family = catalogue.family("dybit3")
    table, _, owners, compiled = coarse_search.coarse_table(family.books, torch.device("cpu"), True)
    x = torch.randn(shape)
    x /= x.abs().amax(1, keepdim=True)
    h = torch.rand(shape) if weighted else None
    sums = coarse_search.coarse_errors(x, h, table.double(), False) if h is None else None
    if sums is None:
        sums = coarse_search.coarse_errors(x, h.double(), table.double(), False)
    before, found = extension.isa(), []
    for isa in ISAS:
        extension.use(isa)
        found.append(compiled.search(x, h, 2))
        assert torch.equal(found[0], found[-1]), isa
    extension.use(before)
    for book, (first, last) in enumerate(owners):
        best = sums[:, first:last].amin(1)
        mine = sums.gather(1, found[0][:, book].long())
        assert bool(((found[0][:, book] >= first) & (found[0][:, book] < last)).all())
        torch.testing.assert_close(mine[:, 0], best, rtol=1e-5, atol=1e-9)
        assert bool((mine[:, 1] >= mine[:, 0] * (1 - 1e-5)).all())
    whole = compiled.search_all([(x, h)], 1)
    pooled = sums.sum(0, keepdim=True)
    for book, (first, last) in enumerate(owners):
        torch.testing.assert_close(
            pooled[0, whole[0, book, 0].long()], pooled[0, first:last].min(), rtol=1e-5, atol=1e-9
        )


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


def foreign(tensor):
    """The tensor with other types, shapes, strides and devices, none of which the kernels may read as it is."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8):
        if dtype != tensor.dtype:
            yield tensor.to(dtype)
    yield tensor.to("meta")
    yield tensor[..., :-1].contiguous()
    yield tensor[:0]
    yield torch.cat([tensor, tensor])[::2]
    yield tensor[None]
    yield tensor.reshape(-1)


BOOK = catalogue.family("s4r2").books[0]
ENTRIES = {
    "fake_quantize": (
        lambda x, scale, offset: codes.fake_quantize(x, scale, offset, BOOK),
        lambda: (torch.randn(6, 40), torch.rand(6, 1) + 0.1, torch.rand(1)),
    ),
    "fake_quantize_dynamic": (
        lambda x: codes.fake_quantize_dynamic(x, BOOK, 1.7, 16),
        lambda: (torch.randn(6, 40),),
    ),
    "round_chosen": (
        lambda x, scale, choice: codes.round_chosen(x, scale, choice, variants(4)),
        lambda: (torch.randn(6, 40), torch.rand(6, 1) + 0.1, torch.arange(6, dtype=torch.uint8)[:, None]),
    ),
    "pass_through": (
        codes.pass_through,
        lambda: (
            *torch.randn(3, 6, 40),
            torch.rand(6, 1),
            torch.randn(9, 2),
            torch.arange(6, dtype=torch.uint8)[:, None],
        ),
    ),
    "encode": (
        lambda x, scale, choice: codes.encode(x, scale, choice, variants(4), 16),
        lambda: (torch.randn(6, 40), torch.rand(6, 3) + 0.1, torch.randint(9, (6, 3), dtype=torch.uint8)),
    ),
    "decode": (
        lambda packed, scale, choice: codes.decode(packed, scale, choice, variants(4), 40, 16),
        lambda: (
            torch.randint(256, (6, 20), dtype=torch.uint8),
            torch.rand(6, 3) + 0.1,
            torch.randint(9, (6, 3), dtype=torch.uint8),
        ),
    ),
    "fit": (
        lambda x, weights, scale: codes.fit(BOOK, x, weights, scale),
        lambda: (torch.randn(6, 40), torch.rand(6, 40), torch.rand(6, 1) + 0.1),
    ),
    "search": (
        lambda x, weights: codes.coarse(torch.rand(64, 12), [(0, 5), (5, 12)]).search(x, weights, 2),
        lambda: (torch.rand(6, 40), torch.rand(6, 40)),
    ),
    "search_all": (
        lambda x, weights: codes.coarse(torch.rand(64, 12), [(0, 5), (5, 12)]).search_all([(x, weights)], 2),
        lambda: (torch.rand(6, 40), torch.rand(6, 40)),
    ),
    "coarse": (
        lambda table: codes.Coarse(table, [(0, 5), (5, 12)]).search(torch.full((2, 9), 0.5), None, 2),
        lambda: (torch.rand(64, 12),),
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_foreign_tensors_never_reach_the_kernels(name, isa):
    """Each is refused, left to torch (None), or gives a result of its own shape that holds no memory of others."""
    entry, make = ENTRIES[name]
    given = make()
    refused = 0
    for place in range(len(given)):
        for other in foreign(given[place]):
            try:
                entry(*given[:place], other, *given[place + 1 :])
            except DyBitError as error:
                refused += 1
                assert "must be a contiguous" in str(error) or "choice must be below" in str(error)
            except ValueError as error:
                assert "values to unpack" in str(error)  # another number of dimensions
    assert refused or name.startswith("fake_quantize")  # which converts every type
