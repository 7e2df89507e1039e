"""Codes and their values against the NumPy oracle, on every instruction set and in plain torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dybit.errors import DyBitError
from dybit.formats import packing
from dybit.formats.codebook import Table
from dybit.formats.format import variants
from dybit.kernels import codes, extension, rounding
from kernels import BOOKS, ISAS, by_torch, hostile

pytestmark = pytest.mark.skipif(not ISAS, reason="no compiled kernels")
exact = settings(derandomize=True, deadline=None, max_examples=10)
SMALL = {"one_bit": Table("one_bit", [-1.0, 1.0]), "hole": Table("hole", [0.0, np.nan, 1.0, -2.0])}


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

    def check():
        packed = codes.encode(torch.from_numpy(x), given_scale, given_choice, books, size)
        np.testing.assert_array_equal(packed.numpy(), packing.pack(expected, bits, size))
        found = codes.decode(packed, given_scale, given_choice, books, columns, size)
        np.testing.assert_array_equal(found.numpy(), values * spread(factor))

    before = extension.isa()
    for name in ISAS:
        extension.use(name)
        check()
    extension.use(before)
    by_torch(check)


def test_plain_torch_encodes_some_rows_at_a_time(monkeypatch):
    books = variants(3)
    x, scale = torch.randn(23, 40), torch.rand(23, 3) + 0.1
    choice = torch.randint(len(books), (23, 3), dtype=torch.uint8)
    expected = codes.encode(x, scale, choice, books, 16)
    monkeypatch.setattr(codes, "_AT_ONCE", 200)
    assert torch.equal(by_torch(lambda: codes.encode(x, scale, choice, books, 16)), expected)
    assert by_torch(lambda: codes.encode(x[:0], scale[:0], choice[:0], books, 16)).shape == (0, expected.shape[1])


def test_every_codebook_encodes_as_the_oracle(isa):
    one = torch.ones(1, 1)
    for book in (BOOKS | SMALL).values():
        x = hostile(book)
        packed = codes.encode(torch.from_numpy(x)[None], one, None, (book,), None)
        np.testing.assert_array_equal(packed.numpy(), packing.pack(book.encode(x)[None], book.bits), err_msg=book.name)


def test_a_choice_beyond_the_codebooks_is_refused():
    packed, x = torch.zeros(1, 4, dtype=torch.uint8), torch.ones(1, 8)
    choice, scale, books = torch.full((1, 1), 9, dtype=torch.uint8), torch.ones(1, 1), variants(4)
    for call in (
        lambda: codes.decode(packed, scale, choice, books, 8, None),
        lambda: codes.encode(x, scale, choice, books, None),
        lambda: rounding.round_chosen(x, scale, choice, books),
        lambda: rounding.pass_through(x, x, x, scale, books, choice),
    ):
        with pytest.raises(DyBitError, match="choice must be below 9, the number of codebooks, but holds 9"):
            call()
