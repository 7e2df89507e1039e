"""The cache of keys and values against plain attention over all of its tokens, every instruction set the same bits."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import on_all

from dybit.errors import DyBitError
from dybit.kernels.cache_config import CacheConfig
from dybit.kernels.kv_cache import KVCache
from kernels import ISAS

pytestmark = [
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(not ISAS, reason="no compiled kernels"),
]
exact = settings(derandomize=True, deadline=None, max_examples=40)


def random_heads(rng, *shape):
    """Random (sequences, heads, tokens, size), the heads of a token side by side as projections give them."""
    sequences, heads, tokens, size = shape
    return torch.from_numpy(rng.standard_normal((sequences, tokens, heads, size)).astype(np.float32)).transpose(1, 2)


def oracle(q, k, v, scale, start=0, window=None, soft_cap=None):
    """Attention of the last tokens in float64: q (heads, tokens, size) to (tokens, heads, value_size)."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    scores = q @ k.mT * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    token, at = torch.arange(k.shape[1]), torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    seen = (token <= at) & (token >= start)
    if window:
        seen &= token > at - window
    return (torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0) @ v).transpose(0, 1)


class Model:
    """What a cache must hold: lists of tensors."""

    def __init__(self, sequences):
        self.keys, self.values = [None] * sequences, [None] * sequences

    def append(self, k, v, counts):
        for i, count in enumerate(counts):
            for held, new in ((self.keys, k), (self.values, v)):
                some = new[i, :, :count]
                held[i] = some if held[i] is None else torch.cat([held[i], some], 1)

    def apply(self, change):
        self.keys, self.values = change(self.keys), change(self.values)


@exact
@given(st.integers(0, 2**32 - 1))
def test_any_history_gives_the_attention_of_its_tokens(seed):
    rng = np.random.default_rng(seed)
    sequences, kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.choice([1, 3]))
    size, width = int(rng.choice([1, 8, 16, 40, 64])), int(rng.choice([1, 16, 33, 64]))
    cache, model = KVCache(sequences, kv_heads, size, width), Model(sequences)
    for _ in range(int(rng.integers(1, 6))):
        tokens = int(rng.choice([1, 2, 7, 63, 64, 65, 130, 300]))
        counts = [tokens if rng.integers(2) else int(rng.integers(0, tokens + 1)) for _ in range(cache.sequences)]
        k, v = (random_heads(rng, cache.sequences, kv_heads, tokens, s) for s in (size, width))
        cache.append(k, v, counts)
        model.append(k, v, counts)
        action = rng.integers(4)
        if action == 0:
            length = int(rng.integers(0, 200))
            cache.crop(length)
            model.apply(lambda held, n=length: [t[:, :n] for t in held])
        elif action == 1:
            indices = rng.integers(0, cache.sequences, int(rng.integers(1, 5))).tolist()
            cache.reorder(indices)
            model.apply(lambda held, order=indices: [held[i] for i in order])
    lengths = [t.shape[1] for t in model.keys]
    assert cache.lengths == lengths
    for i in range(cache.sequences):
        for found, expected in zip(cache.read(i), (model.keys[i], model.values[i]), strict=True):
            assert torch.equal(found, expected)
    tokens = int(rng.choice([1, 2, 9, 40]))
    counts = [min(tokens, length) for length in lengths]
    starts = [int(rng.integers(0, length + 1)) if rng.integers(2) else 0 for length in lengths]
    window = int(rng.integers(1, 200)) if rng.integers(2) else None
    soft_cap = 3.0 if rng.integers(2) else None
    q = random_heads(rng, cache.sequences, kv_heads * group, tokens, size)
    scale = float(rng.choice([size**-0.5, 1.0]))
    found = on_all(lambda _: [cache.attend(q, scale, counts, starts, window, soft_cap)])[0]
    for i, count in enumerate(counts):
        expected = oracle(q[i, :, :count], model.keys[i], model.values[i], scale, starts[i], window, soft_cap)
        np.testing.assert_allclose(found[i, :count], expected, rtol=0, atol=2e-5)
        assert not found[i, count:].any()


def test_copies_share_memory_until_they_change():
    rng = np.random.default_rng(0)
    cache = KVCache(1, 2, 16, 16)
    cache.append(*(random_heads(rng, 1, 2, 100, 16) for _ in range(2)))
    one = cache.nbytes
    cache.reorder([0, 0, 0])
    assert cache.nbytes == one
    before = cache.read(0)[0]
    k, v = (random_heads(rng, 3, 2, 1, 16) for _ in range(2))
    cache.append(k, v)
    assert one < cache.nbytes < 3 * one
    for i in range(3):
        assert torch.equal(cache.read(i)[0], torch.cat([before, k[i]], 1))


def test_cropped_memory_is_free():
    cache = KVCache(1, 1, 16, 16)
    cache.append(*(torch.zeros(1, 1, 1000, 16) for _ in range(2)))
    full = cache.nbytes
    cache.crop(10)
    assert 0 < cache.nbytes < full / 4
    cache.reset(2)
    assert cache.nbytes == 0 and cache.lengths == [0, 0]


def test_threads_do_not_change_bits():
    rng = np.random.default_rng(0)
    cache = KVCache(3, 2, 64, 64)
    cache.append(*(random_heads(rng, 3, 2, 500, 64) for _ in range(2)))
    q = random_heads(rng, 3, 6, 70, 64)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(cache.attend(q, 0.125))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


CONFIGS = [
    *(CacheConfig(bits, bits) for bits in range(2, 9)),
    CacheConfig(4, None),
    CacheConfig(None, 4, rotate_keys=True),
    CacheConfig("bf16", "bf16"),
    CacheConfig("bf16", 3, residual=50),
    CacheConfig("nf4", "int4", group_size=16, value_group_size=16),
    CacheConfig("s8r4", "int8", group_size=64, residual=3, rotate_values=False),
    CacheConfig("s4r2spare", "dybit4mid", group_size=128, value_group_size=128, rotate_keys=True),
]


@exact
@given(st.integers(0, 2**32 - 1))
def test_attention_reads_what_was_stored_and_codes_never_change(seed):
    rng = np.random.default_rng(seed)
    config = CONFIGS[int(rng.integers(len(CONFIGS)))]
    kv_heads, group = int(rng.integers(1, 4)), int(rng.choice([1, 3, 7]))
    size, width = int(rng.choice([1, 16, 40, 64])), int(rng.choice([1, 16, 33, 64, 128]))
    cache = KVCache(int(rng.integers(1, 3)), kv_heads, size, width, config)
    held = [cache.read(i) for i in range(cache.sequences)]
    changed = [[torch.zeros(0, dtype=torch.bool)] * 2 for _ in held]
    for _ in range(int(rng.integers(1, 5))):
        tokens = int(rng.choice([1, 2, 31, 32, 65, 200]))
        new = [random_heads(rng, cache.sequences, kv_heads, tokens, s) for s in (size, width)]
        cache.append(*new)
        for i in range(cache.sequences):
            for side, found in enumerate(cache.read(i)):
                before = held[i][side]
                differs = (found[:, : before.shape[1]] != before).any(2).any(0)
                assert not (differs & changed[i][side]).any()  # BF16 becomes codes once
                changed[i][side] = torch.cat([changed[i][side] | differs, torch.zeros(tokens, dtype=torch.bool)])
                newest = min(config.residual, tokens)
                error = (found - torch.cat([before, new[side][i]], 1))[:, found.shape[1] - newest :].abs()
                assert (error <= new[side][i].abs().max() / 50).all()
        held = [cache.read(i) for i in range(cache.sequences)]
        if rng.integers(3) == 0:
            indices = rng.integers(0, cache.sequences, int(rng.integers(1, 4))).tolist()
            length = int(rng.integers(0, 150))
            cache.reorder(indices)
            cache.crop(length)
            held = [tuple(t[:, :length] for t in held[i]) for i in indices]
            changed = [[t[:length] for t in changed[i]] for i in indices]
            for i, expected in enumerate(held):
                assert all(map(torch.equal, cache.read(i), expected))
    tokens = min(int(rng.choice([1, 2, 30])), min(cache.lengths))
    q = random_heads(rng, cache.sequences, kv_heads * group, tokens, size)
    found = on_all(lambda _: [cache.attend(q, size**-0.5)])[0]
    for i in range(cache.sequences):
        np.testing.assert_allclose(found[i], oracle(q[i], *held[i], size**-0.5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5])
def test_few_rows_read_codes_with_the_bits_of_many(bits, heads):
    rng = np.random.default_rng(0)
    cache = KVCache(1, 1, 64, 64, CacheConfig(bits, bits))
    cache.append(*(random_heads(rng, 1, 1, 330, 64) for _ in range(2)))
    q = random_heads(rng, 1, heads, 12, 64)
    many = cache.attend(q, 0.125)
    found = on_all(lambda _: [cache.attend(q[:, :, -1:], 0.125)])[0]
    np.testing.assert_array_equal(found, many[:, -1:])
    np.testing.assert_allclose(found[0], oracle(q[0, :, -1:], *cache.read(0), 0.125), rtol=0, atol=1e-5)


def least_error(x, books, reaches, centred):
    """The smallest squared error of groups (…, n) in float64, over books and reaches, scales rounded to BF16."""
    half = lambda y: torch.from_numpy(np.asarray(y, dtype=np.float32)).bfloat16().double().numpy()  # noqa: E731
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    offset = half((low + high) / 2) if centred else np.zeros_like(low)
    errors = []
    for book in books:
        levels = np.array(book)
        for reach in reaches:
            scale = half(np.maximum((high - offset) / levels[-1], (low - offset) / levels[0]) * reach)
            ratio = (x - offset) / scale
            nearest = levels[np.abs(ratio[..., None] - levels).argmin(-1)]
            errors.append(((nearest * scale + offset - x) ** 2).sum(-1))
    return np.min(errors, 0)


@pytest.mark.parametrize("config", CONFIGS[:7] + CONFIGS[11:], ids=str)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_rounding_loses_no_more_than_the_best_of_its_scales(config, shift):
    rng = np.random.default_rng(0)
    tokens, size = 2 * config.group_size, 64
    given_heads = [(random_heads(rng, 1, 2, tokens, size) + shift).bfloat16().float() for _ in range(2)]
    cache = KVCache(1, 2, size, size, CacheConfig(**config.to_dict() | {"rotate_keys": False, "rotate_values": False}))
    cache.append(*given_heads)
    groups = [(2, 2, config.group_size, size), (2, tokens, -1, min(config.value_group_size, size))]
    for side, found in enumerate(cache.read(0)):
        x, y = (t.double().numpy().reshape(groups[side]) for t in (given_heads[side][0], found))
        if side == 0:
            x, y = x.swapaxes(2, 3), y.swapaxes(2, 3)
        _, books, reaches, centred = config.native()[side]
        least = least_error(x, books, reaches, centred)
        error = ((x - y) ** 2).sum(-1)
        assert (error <= 1.3 * least + 1e-6).all()  # scales of some books have 5 bits behind the point
        assert error.sum() <= 1.02 * least.sum() + 1e-6


def test_memory_of_four_bits_is_less_than_a_third_of_bf16():
    cache = KVCache(1, 3, 64, 64, CacheConfig())
    cache.append(*(torch.randn(1, 3, 4096, 64) for _ in range(2)))
    assert cache.nbytes <= 0.3 * 4096 * 3 * 64 * 2 * 2


def test_a_group_with_nan_is_nan():
    k, v = torch.randn(1, 1, 32, 64), torch.randn(1, 1, 32, 64)
    k[0, 0, 3, 5], v[0, 0, 7, 2] = torch.nan, torch.inf
    cache = KVCache(1, 1, 64, 64, CacheConfig())
    cache.append(k, v)
    keys, values = (t.isnan() for t in cache.read(0))
    assert keys[0, :, 5].all() and keys.sum() == 32
    assert values[0, 7].all() and values.sum() == 64


def test_zeros_stay_zeros():
    cache = KVCache(1, 1, 64, 64, CacheConfig())
    cache.append(*(torch.zeros(1, 1, 32, 64) for _ in range(2)))
    assert not any(t.any() for t in cache.read(0))


def test_sequences_that_share_tokens_share_their_codes():
    cache = KVCache(1, 1, 64, 64, CacheConfig())
    cache.append(*(torch.randn(1, 1, 3200, 64) for _ in range(2)))
    one = cache.nbytes
    cache.reorder([0] * 4)
    assert cache.nbytes == one
    cache.append(*(torch.randn(4, 1, 1, 64) for _ in range(2)))
    assert cache.nbytes < 2 * one


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: KVCache(1, 0, 8, 8), "kv_heads must be positive, not 0"),
        (
            lambda c: c.append(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 7)),
            "values must have the shape (2, 2, 3, 8), not (2, 2, 3, 7)",
        ),
        (
            lambda c: c.append(torch.zeros(2, 2, 3, 8).double(), torch.zeros(2, 2, 3, 8)),
            "keys must be a contiguous float32 tensor",
        ),
        (lambda c: c.append(*(torch.zeros(2, 2, 3, 8),) * 2, [1, 4]), "counts must be 2 numbers from 0 to 3"),
        (lambda c: c.attend(torch.zeros(2, 3, 1, 8), 1.0), "queries must have a multiple of 2 heads, not 3"),
        (lambda c: c.attend(torch.zeros(2, 2, 1, 8), 1.0), "counts must be at most the 0 tokens of sequence 0, not 1"),
        (lambda c: c.crop(-1), "length must not be negative, not -1"),
        (lambda c: c.reorder([0, 2]), "indices must be from 0 to 1, not [0, 2]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(DyBitError, match=re.escape(message)):
        call(KVCache(2, 2, 8, 8))
