"""Attention against float64 and torch, every instruction set the same bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import on_all
from torch.nn.functional import scaled_dot_product_attention

from kernels import ISAS

pytestmark = [
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(not ISAS, reason="no compiled kernels"),
]
exact = settings(derandomize=True, deadline=None, max_examples=60)


def heads(rng, batch, count, tokens, size):
    """Random (batch, heads, tokens, size), the heads of a token side by side, with numbers between tokens."""
    whole = torch.from_numpy(rng.standard_normal((batch, tokens, count * size + 3)).astype(np.float32))
    return whole[..., : count * size].unflatten(2, (count, size)).transpose(1, 2)


def at(tensor):
    return tensor.data_ptr(), tuple(tensor.stride()[:3])


def run(q, k, v, mask=None, causal=False, offset=0, scale=None, threads=1):
    """The results on every instruction set, (batch, heads, queries, value_size)."""
    (batch, count, queries, size), (_, kv_heads, keys, width) = q.shape, v.shape
    scale = size**-0.5 if scale is None else scale
    given_mask = (0, False, (0,) * 4)
    if mask is not None:
        given_mask = (mask.data_ptr(), mask.dtype == torch.bool, tuple(mask.stride()))

    def call(extension):
        out = torch.full((batch, queries, count, width), torch.nan).transpose(1, 2)
        sizes = (batch, count, kv_heads, queries, keys, size, width)
        extension.attention(sizes, at(q), at(k), at(v), scale, causal, offset, given_mask, at(out), threads)
        return [out]

    return on_all(call)[0]


def oracle(q, k, v, mask=None, causal=False, offset=0, scale=None):
    """Attention in float64; zeros where no key is seen."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril(offset)
        scores = scores.masked_fill(~seen, -torch.inf)
    return (torch.softmax(scores, -1).nan_to_num(0.0) @ v).numpy()


def random_mask(rng, batch, count, queries, keys):
    """A boolean or additive mask that broadcasts over some dimensions and may hide all keys of a query."""
    shape = [n if rng.integers(2) else 1 for n in (batch, count, queries)]
    mask = torch.from_numpy(rng.integers(0, 4, (*shape, keys)) > 0)
    if queries and shape[2] == queries:
        mask[:, :, rng.integers(queries)] = False
    if rng.integers(2):
        hidden = -np.inf if rng.integers(2) else np.finfo(np.float32).min
        mask = torch.where(mask, torch.from_numpy(rng.standard_normal(mask.shape).astype(np.float32)), hidden)
    if rng.integers(4) == 0:  # keys do not lie side by side
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    return mask.expand(batch, count, queries, keys)


@exact
@given(st.integers(0, 2**32 - 1))
def test_close_to_float64(seed):
    rng = np.random.default_rng(seed)
    batch, kv_heads, group = int(rng.integers(1, 3)), int(rng.integers(1, 4)), int(rng.choice([1, 1, 3]))
    queries = int(rng.choice([0, 1, 2, 5, 7, 25, 64, 100]))
    keys = int(rng.choice([0, 1, 2, 16, 17, 63, 65, 100, 257, 300, 530]))
    size, width = int(rng.choice([1, 8, 16, 32, 40, 64, 80])), int(rng.choice([1, 16, 32, 33, 64, 80]))
    q = heads(rng, batch, kv_heads * group, queries, size)
    k, v = heads(rng, batch, kv_heads, keys, size), heads(rng, batch, kv_heads, keys, width)
    mask = random_mask(rng, batch, kv_heads * group, queries, keys) if rng.integers(2) else None
    causal, offset = bool(rng.integers(2)), int(rng.choice([0, keys - queries, -3]))
    scale = None if rng.integers(2) else float(rng.choice([-0.3, 0.0, 2.0]))
    found = run(q, k, v, mask, causal, offset, scale, int(rng.integers(1, 3)))
    largest = max(float(v.abs().max()), 1.0) if v.numel() else 1.0
    expected = oracle(q, k, v, mask, causal, offset, scale)
    np.testing.assert_allclose(found, expected, rtol=0, atol=largest * (5e-6 if scale == 2.0 else 1e-6))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 4, 50, 50, 32), (1, 6, 2, 1, 300, 64), (1, 3, 3, 197, 197, 64)])
def test_no_further_from_float64_than_torch(shape, causal):
    rng = np.random.default_rng(0)
    batch, count, kv_heads, queries, keys, size = shape
    q, k, v = (heads(rng, batch, *s, size) for s in ((count, queries), (kv_heads, keys), (kv_heads, keys)))
    found = run(q, k, v, causal=causal)
    expected = oracle(q, k, v, causal=causal)
    torchs = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).numpy()
    error, other = (np.abs(y - expected).max() for y in (found, torchs))
    assert error <= 1.5 * other + 2e-7


@pytest.mark.parametrize("size", [1e8, 1e15])
def test_the_largest_score_wins_however_large_it_is(size):
    rng = np.random.default_rng(0)
    q, k, v = (heads(rng, 1, 2, 40, 32) for _ in range(3))
    best = (q.double() @ k.double().mT).argmax(3)
    chosen = torch.take_along_dim(v, best[..., None], 2)
    np.testing.assert_array_equal(run(q * size, k, v, scale=1.0), chosen)


def test_large_scores_do_not_overflow():
    rng = np.random.default_rng(0)
    q, k, v = (heads(rng, 1, 2, 300, 32) for _ in range(3))
    found, expected = run(q * 300, k, v, scale=1.0), oracle(q * 300, k, v, scale=1.0)
    assert (np.abs(found - expected) <= 1e-3).mean() > 0.99  # scores near 1e4 are rounded to 1e-3
    assert np.isfinite(found).all()


def test_queries_without_keys_give_zeros_as_in_torch():
    rng = np.random.default_rng(0)
    q, k, v = (heads(rng, 1, 2, 30, 32) for _ in range(3))
    for hidden in (torch.zeros(30, 30, dtype=torch.bool), torch.full((30, 30), -torch.inf)):
        mask = hidden.expand(1, 2, 30, 30)
        np.testing.assert_array_equal(run(q, k, v, mask), scaled_dot_product_attention(q, k, v, mask))
        np.testing.assert_array_equal(run(q, k, v, mask), 0)
    np.testing.assert_array_equal(run(q, k, v, causal=True, offset=-10)[:, :, :10], 0)
    np.testing.assert_array_equal(run(q, k[:, :, :0], v[:, :, :0]), 0)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_nan_reaches_the_same_queries_as_in_torch(where, bad, queries):
    rng = np.random.default_rng(0)
    given_heads = {"q": heads(rng, 1, 2, queries, 32), "k": heads(rng, 1, 2, 300, 32), "v": heads(rng, 1, 2, 300, 32)}
    given_heads[where][0, 1, -1, 3] = bad
    found, expected = run(*given_heads.values()), scaled_dot_product_attention(*given_heads.values()).numpy()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_nan_in_a_value_reaches_its_column():
    rng = np.random.default_rng(0)
    q, k, v = (heads(rng, 1, 2, 40, 32) for _ in range(3))
    v[0, 1, 7, 3] = torch.nan
    found = np.isnan(run(q, k, v))
    assert found[0, 1, :, 3].all() and found.sum() == 40


def test_nan_of_any_payload_stays():
    rng = np.random.default_rng(0)
    q, k, v = (heads(rng, 1, 1, 40, 32) for _ in range(3))
    k[0, 0, 7] = torch.from_numpy(np.array([0x7FC00155], dtype=np.uint32).view(np.float32))
    assert np.isnan(run(q, k, v)).all()


def test_threads_do_not_change_bits():
    rng = np.random.default_rng(0)
    q, k, v = heads(rng, 1, 6, 130, 64), heads(rng, 1, 2, 300, 64), heads(rng, 1, 2, 300, 64)
    np.testing.assert_array_equal(run(q, k, v, threads=1), run(q, k, v, threads=2))
