"""The cache of the kernels as a cache of transformers: its methods, generate with it, fused and not."""

import copy
import pickle

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers_models import build

import dybit
from dybit import CacheConfig
from dybit.integrations.decoder_cache import DecoderCache


def filled(cache):
    x = torch.Generator().manual_seed(0)
    for layer in range(2):
        for tokens in (5, 1):
            parts = [torch.randn(3, 2, tokens, 8, generator=x) for _ in "kv"]
            found = cache.update(*parts, layer)
    return found


def same(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_methods_are_those_of_the_dynamic_cache():
    cache, reference = DecoderCache(2), DynamicCache()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    assert same(filled(cache), filled(reference))
    assert cache.is_initialized and cache.is_croppable and cache.get_max_length() == -1
    assert cache.get_mask_sizes(2, 0) == reference.get_mask_sizes(2, 0)
    for change in (
        lambda c: c.crop(-2),
        lambda c: c.crop(0),
        lambda c: c.reorder_cache(torch.tensor([2, 0, 0])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([4, 1, 0])),
    ):
        change(cache)
        change(reference)
        assert cache.get_seq_length() == reference.get_seq_length()
        assert same(filled(cache), filled(reference)) if cache.layers[0].held.sequences == 3 else True
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.fixture(scope="module")
def model():
    return build("llama_tied").eval()


def prompts():
    ids = torch.randint(1, 101, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


WAYS = [
    {"do_sample": False},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": False, "prompt_lookup_num_tokens": 3},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: ", ".join(way))
def test_generates_what_the_dynamic_cache_does(model, way):
    given = prompts() if "prompt_lookup_num_tokens" not in way else {"input_ids": prompts()["input_ids"][1:]}
    floats = dybit.cache(model, CacheConfig(None, None))
    expected = model.generate(**given, max_new_tokens=12, **way)
    assert torch.equal(model.generate(**given, max_new_tokens=12, past_key_values=floats, **way), expected)
    assert floats.nbytes > 0


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.3)])
def test_logits_with_codes_are_close(model, bits, bound):
    given, cache = prompts(), dybit.cache(model, CacheConfig(bits, bits))
    with torch.no_grad():
        found, expected = model(**given, past_key_values=cache).logits, model(**given).logits
    seen = given["attention_mask"].bool()
    assert 0 < (found - expected)[seen].norm() < bound * expected[seen].norm()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: ", ".join(way))
def test_a_fused_model_attends_to_the_same_codes(model, way):
    given = prompts() if "prompt_lookup_num_tokens" not in way else {"input_ids": prompts()["input_ids"][1:]}
    quantized = dybit.quantize_(build("llama_tied").eval(), dybit.Recipe(weights=4, group_size=32))
    fused = dybit.fuse(quantized)
    caches = [dybit.cache(one, CacheConfig(4, 4, residual=5)) for one in (quantized, fused)]
    with torch.no_grad():
        for step in range(3):
            tokens = given["input_ids"][:, step * 20 : step * 20 + 20]
            one, other = (m(tokens, past_key_values=c).logits for m, c in zip((quantized, fused), caches, strict=True))
            torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    cache = dybit.cache(fused)
    assert fused.generate(**given, max_new_tokens=8, past_key_values=cache, **way).shape[1] == 78
    assert cache.get_seq_length() >= 77 and cache.layers[0].held.kv_heads == 2


def test_copies_are_independent(model):
    given, cache = prompts(), dybit.cache(model)
    with torch.no_grad():
        model(**given, past_key_values=cache)
        other = copy.deepcopy(cache)
        before = [t.clone() for t in other.layers[0].held.read(0)]
        model(given["input_ids"][:, :5], past_key_values=cache)
    assert (cache.get_seq_length(), other.get_seq_length()) == (75, 70)
    assert all(map(torch.equal, other.layers[0].held.read(0), before))
    with pytest.raises(dybit.DyBitError, match="cannot be pickled"):
        pickle.dumps(cache)


def test_offloading_leaves_the_memory_where_it_is(model):
    cache = dybit.cache(model)
    filled(cache)
    layer = cache.layers[0]
    before = layer.held.read(0)
    layer.offload()
    layer.prefetch()
    assert all(map(torch.equal, layer.held.read(0), before))


def test_errors(model):
    with pytest.raises(dybit.DyBitError, match="model must be a model of transformers, not Linear"):
        dybit.cache(torch.nn.Linear(2, 2))
    with pytest.raises(dybit.DyBitError, match="has an encoder"):
        dybit.cache(build("whisper"))
    config = copy.deepcopy(model.config)
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(dybit.DyBitError, match="layers of linear_attention"):
        dybit.cache(type("Model", (), {"config": config}))
