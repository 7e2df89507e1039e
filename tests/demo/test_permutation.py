import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dybit.demo.permutation import permute_channels_


def llama(tied=True, bias=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # norms and biases start as ones and zeros, which hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@torch.no_grad()
def test_preserves_the_function(tied, bias):
    model = llama(tied, bias)
    ids = torch.arange(20).reshape(2, 10)
    before, weight = model(input_ids=ids).logits, model.model.layers[1].self_attn.v_proj.weight.clone()
    assert permute_channels_(model) is model
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-4)
    assert not torch.equal(model.model.layers[1].self_attn.v_proj.weight, weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_seed_decides():
    one, two, other = (permute_channels_(llama(), seed) for seed in (1, 1, 2))
    weights = [model.model.layers[0].mlp.down_proj.weight for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
