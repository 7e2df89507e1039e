"""The configuration of a cache: what it accepts, what it counts, and the levels that the kernels get."""

import re

import numpy as np
import pytest

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.kernels.cache_config import FLOAT_CACHE, CacheConfig


@pytest.mark.parametrize("bits", range(2, 9))
def test_widths_have_formats_of_their_bits(bits):
    keys, values, _ = CacheConfig(bits, bits).native()
    for found, centred in ((keys, True), (values, False)):
        assert found[0] == bits and found[3] is centred
        assert all(len(book) <= 2**bits and book == sorted(book) for book in found[1])


def test_names_are_families_of_the_catalogue():
    keys, values, _ = CacheConfig("nf4", "s8r2").native()
    np.testing.assert_array_equal(keys[1], [book.levels for book in catalogue.family("nf4").books])
    np.testing.assert_array_equal(np.array(values[1]) / 64, [catalogue.family("s8r2").books[0].levels])


def test_floats_have_no_codes():
    assert FLOAT_CACHE.native()[0] == (32, [], [], False)
    assert CacheConfig("bf16", None).native()[:2] == ((16, [], [], False), (32, [], [], False))


@pytest.mark.parametrize(
    ("config", "size", "bits"),
    [
        (CacheConfig(), 64, (5.0, 4.25)),
        (CacheConfig(3, 2, group_size=64), 128, (3.5, 2.25)),
        (CacheConfig(value_group_size=128), 128, (5.0, 4.125)),
        (CacheConfig(), 80, (5.0, 5.0)),
        (CacheConfig("bf16", None), 64, (16, 32)),
        (CacheConfig(), 8, (5.0, 10.0)),
    ],
)
def test_bits_count_scales_and_offsets(config, size, bits):
    assert config.bits_per_number(size) == bits


def test_dict_makes_the_same_config():
    config = CacheConfig(3, "nf4", 64, 32, 7, True, False)
    assert CacheConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keys": 1}, "keys must be 2 to 8 bits, 'bf16', a format or None, not 1"),
        ({"values": 4.0}, "values must be 2 to 8 bits, 'bf16', a format or None, not 4.0"),
        ({"values": True}, "values must be 2 to 8 bits"),
        ({"keys": "no such"}, "no such"),
        ({"keys": "u4"}, "keys must be a signed format, not 'u4'"),
        ({"keys": "dybit4"}, "keys must be a family of at most 4 codebooks of one size, not 'dybit4'"),
        ({"keys": "e4m3"}, "keys of more than 4 bits must be an integer or a DyBit format, not 'e4m3'"),
        ({"group_size": 48}, "group_size must be one of 16, 32, 64, 128, not 48"),
        ({"value_group_size": 0}, "value_group_size must be one of 16, 32, 64, 128, not 0"),
        ({"residual": -1}, "residual must be a number of tokens, not -1"),
        ({"rotate_keys": 1}, "rotate_keys must be True or False, not 1"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(DyBitError, match=re.escape(message)):
        CacheConfig(**fields)
