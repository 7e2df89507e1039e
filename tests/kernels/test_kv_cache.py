"""The cache of keys and values against plain attention over all of its tokens, every instruction set the same bits."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import on_all

from dybit.errors import DyBitError
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
