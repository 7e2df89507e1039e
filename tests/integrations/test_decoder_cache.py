import torch
from transformers.cache_utils import DynamicCache

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
