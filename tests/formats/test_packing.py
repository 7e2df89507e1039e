"""Packing against an independent bit string, for every width, with group tails and hostile input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dybit.errors import DyBitError
from dybit.formats.packing import pack, packed_size, unpack

WIDTHS = range(1, 9)
GROUPS = [None, 1, 2, 3, 5, 7, 8, 16, 32, 100]


def packed_row(codes, bits, group_size):
    """The definition: a group is one big integer with code i at bit i·bits, stored little-endian."""
    step = group_size or max(len(codes), 1)
    result = b""
    for start in range(0, len(codes), step):
        group = codes[start : start + step]
        number = sum(code << (i * bits) for i, code in enumerate(group))
        result += number.to_bytes(-(-len(group) * bits // 8), "little")
    return list(result)


@st.composite
def rows(draw):
    bits = draw(st.integers(1, 8))
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, 70)))
    codes = draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    group_size = draw(st.one_of(st.none(), st.integers(1, 80)))
    return np.array(codes, dtype=np.uint8).reshape(shape), bits, group_size


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_matches_the_definition(bits, group_size):
    generator = np.random.default_rng(bits)
    for count in (1, 2, 7, 8, 9, 31, 32, 33, 64, 100):
        codes = generator.integers(0, 1 << bits, size=(3, count))
        packed = pack(codes, bits, group_size)
        assert packed.dtype == np.uint8
        assert packed.shape == (3, packed_size(count, bits, group_size))
        assert packed.tolist() == [packed_row(row.tolist(), bits, group_size) for row in codes]
        assert unpack(packed, count, bits, group_size).tolist() == codes.tolist()


@given(rows())
@settings(derandomize=True, deadline=None)
def test_round_trip(case):
    codes, bits, group_size = case
    packed = pack(codes, bits, group_size)
    assert packed.shape == (codes.shape[0], packed_size(codes.shape[1], bits, group_size))
    restored = unpack(packed, codes.shape[1], bits, group_size)
    assert restored.dtype == np.uint8
    assert np.array_equal(restored, codes)
    assert packed.tolist() == [packed_row(row.tolist(), bits, group_size) for row in codes]


def test_golden_bytes():
    # 3-bit codes 1, 2, 3: 011'010'001 from the top, so 0xd1 and the ninth bit.
    assert pack([1, 2, 3], 3).tolist() == [0b11010001, 0b0]
    assert pack([1, 2, 7], 3).tolist() == [0b11010001, 0b1]
    assert pack([0x1, 0xF], 4).tolist() == [0xF1]
    # Groups of two 3-bit codes: 6 bits each, every group in a byte of its own.
    assert pack([1, 2, 3, 4, 5], 3, group_size=2).tolist() == [0b010001, 0b100011, 0b101]


@pytest.mark.parametrize(
    ("count", "bits", "group_size", "size"),
    [
        (0, 3, None, 0),
        (0, 3, 32, 0),
        (1, 1, None, 1),
        (8, 3, None, 3),  # 3-bit really takes 3 bits
        (4096, 3, 128, 1536),
        (100, 3, 32, 3 * 12 + 2),
        (100, 5, 7, 14 * 5 + 2),
        (10, 8, 3, 10),
        (5, 2, 1, 5),
        (5, 4, 100, 3),
    ],
)
def test_sizes(count, bits, group_size, size):
    assert packed_size(count, bits, group_size) == size
    assert pack(np.zeros(count, dtype=np.uint8), bits, group_size).shape == (size,)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
@pytest.mark.parametrize("group_size", [None, 2])
def test_empty(shape, group_size):
    codes = np.zeros(shape, dtype=np.uint8)
    packed = pack(codes, 3, group_size)
    assert packed.shape == (*shape[:-1], packed_size(shape[-1], 3, group_size))
    assert unpack(packed, shape[-1], 3, group_size).shape == shape


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, np.uint64])
def test_any_integer_type_and_layout(dtype):
    codes = np.arange(120, dtype=dtype).reshape(2, 3, 20) % 8
    strided = codes.transpose(1, 0, 2)[:, :, ::2]
    assert unpack(pack(strided, 3, 4), 10, 3, 4).tolist() == strided.tolist()
    codes.flags.writeable = False
    assert unpack(pack(codes, 5), 20, 5).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_spare_bits_are_zero(bits):
    packed = pack(np.full(3, (1 << bits) - 1), bits)
    assert int.from_bytes(packed.tobytes(), "little") == (1 << (3 * bits)) - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack([8], 3), "codes must fit 3 bits, found 8 to 8"),
        (lambda: pack([0, -1], 3), "codes must fit 3 bits, found -1 to 0"),
        (lambda: pack(np.array([2**40]), 8), f"found {2**40}"),
        (lambda: pack(np.array([2**64 - 1], dtype=np.uint64), 8), f"found {2**64 - 1}"),
        (lambda: pack([1.0], 3), "codes must be an array of integers, not float64"),
        (lambda: pack([True], 1), "codes must be an array of integers, not bool"),
        (lambda: pack(["1"], 3), "codes must be an array of integers"),
        (lambda: pack(3, 3), "of shape ()"),
        (lambda: pack([1], 0), "bits=0"),
        (lambda: pack([1], 9), "bits=9"),
        (lambda: pack([1], 3, 0), "group_size=0"),
        (lambda: pack([1], 3, -2), "group_size=-2"),
        (lambda: packed_size(-1, 3), "count=-1"),
        (lambda: unpack(np.zeros(2, dtype=np.uint8), 8, 3), "rows of 3 bytes, not uint8 of shape (2,)"),
        (lambda: unpack(np.zeros(4, dtype=np.uint8), 8, 3), "rows of 3 bytes"),
        (lambda: unpack(np.zeros(3), 8, 3), "packed must be uint8 with rows of 3 bytes, not float64"),
        (lambda: unpack(np.uint8(3), 1, 3), "of shape ()"),
        (lambda: unpack(np.zeros(3, dtype=np.uint8), -1, 3), "count=-1"),
        (lambda: unpack(np.zeros(3, dtype=np.uint8), 8, 12), "bits=12"),
    ],
)
def test_hostile_input(call, message):
    with pytest.raises(DyBitError) as error:
        call()
    assert message in str(error.value)
