import copy
import pickle
import warnings

import pytest
import torch
from decoders import FIELDS, decoder, padded
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import dybit
from dybit.layers.quantized import FusedModule, is_fused
from dybit.runtime.decoder import FAMILIES

W4 = {"weights": 4, "group_size": 32, "method": "absmax"}
INT8 = {"activations": "int8", "activation_mode": "dynamic", "activation_group_size": 32}


def pair(family="Llama", recipe=W4, **fields):
    """A quantized model and its fused form."""
    model = dybit.quantize_(decoder(family, **fields), dybit.Recipe(**recipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = dybit.fuse(model)
    assert isinstance(fused, FusedModule) and type(fused).__name__ == type(model).__name__
    return model, fused


def close(one, other, bound=2e-5):
    assert one.shape == other.shape
    assert float((one - other).abs().max()) < bound


def ran(fused):
    """Whether the kernels' cache came back, and not one of transformers."""
    return type(fused(torch.tensor([[5, 6]])).past_key_values).__name__ == "DecoderCache"


def test_every_family_is_tested():
    assert {f"{name}Model" for name in FIELDS} == set(FAMILIES)


@pytest.mark.parametrize("family", FIELDS)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_model(family):
    model, fused = pair(family)
    ids, mask = padded()
    close(model(ids).logits, fused(ids).logits)
    one, other = model(ids, attention_mask=mask).logits, fused(ids, attention_mask=mask).logits
    close(one * mask[..., None], other * mask[..., None])
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        options |= {"do_sample": False, "max_new_tokens": 9, "attention_mask": mask}
        assert torch.equal(model.generate(ids, **options), fused.generate(ids, **options))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3", "GPT2"])
@torch.no_grad()
def test_rounded_inputs(family):
    """A value between two codes may fall on the other one."""
    model, fused = pair(family, W4 | INT8)
    ids, _ = padded()
    one, other = model(ids).logits, fused(ids).logits
    close(one, other, 0.1)
    assert float((one - other).abs().mean()) < 2e-3


@torch.no_grad()
def test_embeddings_and_a_head_in_floating_point():
    recipe = W4 | {"rules": {"lm_head": None, "model.embed_tokens": None}}
    model, fused = pair(recipe=recipe, tie_word_embeddings=False)
    ids, _ = padded()
    close(model(ids).logits, fused(ids).logits)
    close(model.model(ids).last_hidden_state, fused.model(ids).last_hidden_state)


@torch.no_grad()
def test_the_forward_of_the_model():
    model, fused = pair()
    ids, mask = padded()
    for options in (
        {"logits_to_keep": 2},
        {"logits_to_keep": torch.tensor([1, 3])},
        {"labels": ids},
        {"use_cache": False},
        {"output_hidden_states": True},
        {"attention_mask": mask.flip(1)},  # padding on the right
        {"position_ids": torch.arange(4, 15)[None]},
    ):
        one, other = model(ids, **options), fused(ids, **options)
        close(one.logits, other.logits)
        assert set(one) == set(other)
        if "loss" in one:
            close(one.loss, other.loss)
    close(model(ids, return_dict=False)[0], fused(ids, return_dict=False)[0])
    close(
        model(inputs_embeds=model.model.embed_tokens(ids)).logits,
        fused(inputs_embeds=model.model.embed_tokens(ids)).logits,
    )
    close(model.model(ids).last_hidden_state, fused.model(ids).last_hidden_state)
    assert fused(ids, use_cache=False).past_key_values is None


def test_gradients_of_inputs_come_from_the_model_itself():
    model, fused = pair()
    x = torch.randn(1, 4, 64, requires_grad=True)
    fused(inputs_embeds=x).logits.sum().backward()
    expected = x.grad.clone()
    x.grad = None
    model(inputs_embeds=x).logits.sum().backward()
    close(x.grad, expected)


@torch.no_grad()
def test_long_prompts_in_chunks_and_with_more_positions():
    model, fused = pair(max_position_embeddings=4096)
    ids = torch.randint(3, 101, (2, 700))
    close(model(ids).logits, fused(ids).logits, 5e-5)
    first = fused(ids[:, :300])
    second = fused(ids[:, 300:], past_key_values=first.past_key_values)
    close(model(ids).logits[:, 300:], second.logits, 5e-5)


@torch.no_grad()
def test_ways_to_generate():
    model, fused = pair()
    ids, mask = padded()
    options = {"do_sample": False, "max_new_tokens": 12, "attention_mask": mask}
    torch.manual_seed(3)
    one = model.generate(ids, **options | {"do_sample": True, "num_return_sequences": 2})
    torch.manual_seed(3)
    assert torch.equal(one, fused.generate(ids, **options | {"do_sample": True, "num_return_sequences": 2}))
    ids, options = ids[:1].repeat(1, 2), {"do_sample": False, "max_new_tokens": 12}
    expected = model.generate(ids, **options)
    assert torch.equal(expected, fused.generate(ids, prompt_lookup_num_tokens=3, **options))
    assert torch.equal(expected, fused.generate(ids, assistant_model=pair()[1], **options))
    assert torch.equal(expected, model.generate(ids, assistant_model=fused, **options))

    class Streamer(BaseStreamer):
        seen, ended = (), False

        def put(self, value):
            self.seen += tuple(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Streamer()
    fused.generate(ids, streamer=streamer, **options)
    assert streamer.ended and list(streamer.seen) == expected[0].tolist()


@torch.no_grad()
def test_a_conversation_continues_its_cache():
    model, fused = pair()
    ids, _ = padded(1)
    options = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True}
    one, other = model.generate(ids, **options), fused.generate(ids, **options)
    longer = torch.cat([one.sequences, ids], 1)
    again = [
        m.generate(longer, past_key_values=x.past_key_values, **options) for m, x in ((model, one), (fused, other))
    ]
    assert torch.equal(again[0].sequences, again[1].sequences)


@torch.no_grad()
def test_another_cache_is_read_by_the_models_own_layers():
    model, fused = pair()
    ids, _ = padded(1)
    options = {"do_sample": False, "max_new_tokens": 5}
    with pytest.warns(dybit.DyBitWarning, match="DynamicCache"):
        made = fused.generate(ids, past_key_values=DynamicCache(), **options)
    assert torch.equal(made, model.generate(ids, **options))
    fused.generate(ids, past_key_values=DynamicCache(), **options)  # warns once


@torch.no_grad()
def test_a_mask_with_holes_is_applied_by_the_models_own_layers():
    model, fused = pair()
    ids, _ = padded(1)
    mask = torch.ones_like(ids)
    mask[0, 1] = 0
    with pytest.warns(dybit.DyBitWarning, match="not padding on the left"):
        made = fused(ids, attention_mask=mask).logits
    assert torch.equal(made, model(ids, attention_mask=mask).logits)
    fused(ids, attention_mask=mask)  # warns once


@torch.no_grad()
def test_changes_of_the_model_are_seen():
    model, fused = pair()
    ids, _ = padded()
    before = fused(ids).logits
    model.model.layers[1].input_layernorm.weight.mul_(1.5)
    after = fused(ids).logits
    assert not torch.equal(before, after)
    close(model(ids).logits, after)
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    close(model(ids).logits, fused(ids).logits)
    assert len(seen) == 2
    handle.remove()
    assert ran(fused)


@torch.no_grad()
def test_copies_and_pickles():
    _, fused = pair()
    ids, _ = padded()
    for made in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):  # our own bytes
        assert is_fused(made) and ran(made)
        assert torch.equal(made(ids).logits, fused(ids).logits)


def test_wrong_inputs():
    _, fused = pair()
    with torch.no_grad():
        with pytest.raises(IndexError, match="token 101 is not among the 101"):
            fused(torch.tensor([[5, 101]]))
        cache = fused(torch.tensor([[5, 6], [7, 8]])).past_key_values
        with pytest.raises(dybit.DyBitError, match="another number of sequences"):
            fused(torch.tensor([[5]]), past_key_values=cache)
        _, fused = pair("GPT2")
        with pytest.raises(IndexError, match="position 64 is not among the 64"):
            fused(torch.zeros(1, 65, dtype=torch.int64))


def test_models_that_do_not_fit_are_fused_layer_by_layer():
    model = dybit.quantize_(decoder(), dybit.Recipe(**W4 | {"rules": {"*.1.self_attn.q_proj": None}}))
    with pytest.warns(dybit.DyBitWarning, match="layer by layer: 'q_proj' of LlamaAttention"):
        fused = dybit.fuse(model)
    ids, _ = padded()
    with torch.no_grad():
        close(model(ids).logits, fused(ids).logits)


def test_kept_rows_of_positions_are_threads_own():
    """Two threads generate at a time; one of them needs more positions."""
    from concurrent.futures import ThreadPoolExecutor

    model, fused = pair(max_position_embeddings=4096)
    ids = [torch.randint(3, 101, (1, n)) for n in (40, 600, 1100, 30)]
    with torch.no_grad():
        expected = [model(x).logits for x in ids]

    def run(x):
        with torch.no_grad():
            return fused(x).logits

    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(expected, pool.map(run, ids), strict=True):
            close(one, other, 1e-4)
