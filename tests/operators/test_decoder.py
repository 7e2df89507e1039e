"""The kernels' decoder against the same layers written in torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import packed
from torch.nn import functional

from dybit.errors import DyBitError
from dybit.kernels.kv_cache import KVCache
from dybit.operators.decoder import Decoder, DecoderLayer, DecoderNorm, DecoderSizes, left_padding
from dybit.operators.packed_weight import Product

VOCABULARY, PLACES = 23, 40


class Reference:
    """A decoder of random weights, and what it computes. ``joined``: products that share inputs are one weight."""

    def __init__(self, seed, heads=4, kv_heads=2, gated=True, parallel=False, posts=False, joined=False, square=True):
        rng = np.random.default_rng(seed)
        self.sizes = DecoderSizes(32, 48, heads, kv_heads, 16, rotary_pairs=6, parallel=parallel)
        self.values, self.square, self.gated, self.posts = {}, square, gated, posts
        self.normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        self.rng = rng

        def product(name, rows, columns):
            weight = packed(rng, rows, columns, inputs="", group_size=16)
            bias = self.normal(rows)
            matrix = weight.dequantize()
            self.values[name] = matrix, bias
            return Product(weight, bias)

        def norm(name, columns):
            weight, bias = 1 + self.normal(columns) / 4, None if square else self.normal(columns) / 4
            self.values[name] = weight, bias
            return DecoderNorm(weight, bias, 1e-5, square, 0.25)

        widths = [heads * 16, kv_heads * 16, kv_heads * 16]
        gates = [48, 48] if gated else [48]
        self.layers = []
        for i in range(2):
            names = ("before", "after", "middle", "last", "q_norm", "k_norm")
            norms = [norm(f"{i}{n}", 16 if "_" in n else 32) for n in names]
            if not posts:
                norms[1] = norms[3] = None
            if parallel:
                norms[2] = None
            inputs = [sum(widths)] if joined else widths
            layer = DecoderLayer(
                norms=tuple(norms),
                inputs=tuple(product(f"{i}in{j}", n, 32) for j, n in enumerate(inputs)),
                out=product(f"{i}out", 32, heads * 16),
                gates=tuple(product(f"{i}gate{j}", n, 32) for j, n in enumerate([sum(gates)] if joined else gates)),
                gated=gated,
                down=product(f"{i}down", 32, 48),
                activation="silu",
                scale=0.3,
                score_cap=7.0 if posts else 0.0,
                window=5 if i else 0,
                rotary=0,
            )
            self.layers.append(layer)
        self.table, self.places = self.normal(VOCABULARY, 32), self.normal(PLACES, 32)
        self.cosine, self.sine = self.normal(PLACES, 6), self.normal(PLACES, 6)
        self.decoder = Decoder(
            self.sizes, self.layers, self.table, positions=self.places, last=norm("norm", 32),
            head=product("head", VOCABULARY, 32), embedding_scale=0.5, logit_cap=20.0,
        )  # fmt: skip
        self.decoder.set_rotary(0, self.cosine, self.sine)

    def caches(self, sequences):
        sizes = self.sizes
        return [KVCache(sequences, sizes.kv_heads, 16, 16).native for _ in self.layers]

    def linear(self, prefix, x):
        parts = sorted(name for name in self.values if name.startswith(prefix))
        return torch.cat([functional.linear(x, *self.values[name]) for name in parts], -1)

    def norm(self, name, x):
        weight, bias = self.values[name]
        if not self.square:
            return functional.layer_norm(x, x.shape[-1:], weight + 0.25, bias, 1e-5)
        return functional.rms_norm(x, x.shape[-1:], weight + 0.25, 1e-5)

    def turn(self, x, positions):
        a, b, rest = x[..., :6], x[..., 6:12], x[..., 12:]
        c, s = self.cosine[positions][:, :, None], self.sine[positions][:, :, None]
        return torch.cat([a * c - b * s, b * c + a * s, rest], -1)

    def compute(self, ids, positions, starts):
        """Logits and rows of all tokens of the sequences."""
        sizes, h = self.sizes, self.table[ids] * 0.5 + self.places[positions]
        count = ids.shape[1]
        token = torch.arange(count)
        for i, layer in enumerate(self.layers):
            x = self.norm(f"{i}before", h)
            q, k, v = (
                part.unflatten(-1, (-1, 16))
                for part in self.linear(f"{i}in", x).split(
                    [n * 16 for n in (sizes.heads, sizes.kv_heads, sizes.kv_heads)], -1
                )
            )
            q, k = self.turn(self.norm(f"{i}q_norm", q), positions), self.turn(self.norm(f"{i}k_norm", k), positions)
            k, v = (part.repeat_interleave(sizes.heads // sizes.kv_heads, 2) for part in (k, v))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * layer.scale
            if layer.score_cap:
                scores = layer.score_cap * torch.tanh(scores / layer.score_cap)
            seen = (token <= token[:, None]) & (token >= starts[:, None, None])
            if layer.window:
                seen = seen & (token > token[:, None] - layer.window)
            weights = torch.softmax(scores.masked_fill(~seen[:, None], -math.inf), -1).nan_to_num()
            mixed = self.linear(f"{i}out", torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
            mixed = self.norm(f"{i}after", mixed) if self.posts else mixed
            other = x if sizes.parallel else self.norm(f"{i}middle", h + mixed)
            inner = self.linear(f"{i}gate", other)
            inner = functional.silu(inner[..., :48]) * (inner[..., 48:] if self.gated else 1)
            last = self.linear(f"{i}down", inner)
            h = h + mixed + (self.norm(f"{i}last", last) if self.posts else last)
        h = self.norm("norm", h)
        return h, 20 * torch.tanh(self.linear("head", h) / 20)


def close(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 2e-5 * (1 + float(expected.abs().max()))


@given(
    seed=st.integers(0, 9),
    gated=st.booleans(),
    parallel=st.booleans(),
    posts=st.booleans(),
    joined=st.booleans(),
    square=st.booleans(),
    sequences=st.integers(1, 3),
    cut=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_rows_and_logits(seed, gated, parallel, posts, joined, square, sequences, cut):
    made = Reference(seed, gated=gated, parallel=parallel, posts=posts and not parallel, joined=joined, square=square)
    ids = torch.from_numpy(made.rng.integers(0, VOCABULARY, (sequences, 10)))
    positions = torch.from_numpy(made.rng.integers(0, PLACES, (sequences, 10)))
    starts = torch.from_numpy(made.rng.integers(0, 5, sequences)).int()
    rows, logits = made.compute(ids, positions, starts)
    caches = made.caches(sequences)
    if cut:
        made.decoder.run(ids[:, :cut].contiguous(), positions[:, :cut].contiguous(), caches, starts)
    given = (ids[:, cut:].contiguous(), positions[:, cut:].contiguous(), caches, starts)
    hidden, scores = made.decoder.run(*given, hidden=True, logits=2)
    counts = (torch.arange(10) >= starts[:, None])[:, cut:, None]  # padding has no meaning
    close(hidden * counts, rows[:, cut:] * counts)
    close(scores * counts[:, -2:], logits[:, cut:][:, -2:] * counts[:, -2:])


def test_embeddings_in_place_of_tokens():
    made = Reference(0)
    ids, positions = torch.tensor([[3, 5, 7]]), torch.tensor([[0, 1, 2]])
    one = made.decoder.run(ids, positions, made.caches(1), hidden=True)[0]
    other = made.decoder.run(made.table[ids] * 0.5, positions, made.caches(1), hidden=True)[0]
    assert torch.equal(one, other)


def test_wrong_arguments_change_nothing():
    made, ids = Reference(0), torch.tensor([[3, 5]])
    places, caches = torch.tensor([[0, 1]]), made.caches(1)
    with pytest.raises(IndexError, match=f"token 23 is not among the {VOCABULARY} of the vocabulary"):
        made.decoder.run(torch.tensor([[3, 23]]), places, caches)
    with pytest.raises(IndexError, match=f"position {PLACES} is not among the {PLACES}"):
        made.decoder.run(ids, torch.tensor([[0, PLACES]]), caches)
    with pytest.raises(IndexError, match="position -1"):
        made.decoder.run(ids, torch.tensor([[0, -1]]), caches)
    with pytest.raises(DyBitError, match="another number of sequences"):
        made.decoder.run(ids, places, made.caches(2))
    with pytest.raises(DyBitError, match="heads of another size"):
        made.decoder.run(ids, places, [KVCache(1, 2, 8, 16).native for _ in range(2)])
    with pytest.raises(DyBitError, match="a cache for each layer"):
        made.decoder.run(ids, places, caches[:1])
    with pytest.raises(DyBitError, match="positions must be a contiguous int64"):
        made.decoder.run(ids, places.float(), caches)
    assert [cache.length(0) for cache in caches] == [0, 0]


def test_weights_that_do_not_fit():
    made = Reference(0)
    bad = DecoderSizes(32, 40, 4, 2, 16, rotary_pairs=6)
    with pytest.raises(DyBitError, match="do not fit"):
        Decoder(bad, made.layers, made.table)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 5))
def test_left_padding(starts, hole):
    mask = (torch.arange(6) >= torch.tensor(starts)[:, None]).long()
    assert left_padding(mask).tolist() == starts
    mask[0, hole] = 0
    found = left_padding(mask)
    if hole > starts[0] and hole < 6:
        assert found is None
    else:
        assert found is not None
