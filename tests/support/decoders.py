"""Tiny decoders of transformers with random weights."""

import torch
import transformers

TEXT = {
    "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FIELDS = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32, "attention_bias": True},
    "SmolLM3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    "Phi3": {"sliding_window": 6, "partial_rotary_factor": 0.5},
    "Gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 5, "layer_types": SLIDING},
    "GPT2": {"n_inner": 96, "max_position_embeddings": 64},
    "Phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
}
MODELS = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def decoder(family="Llama", **fields):
    """A model whose logits and norms are not all alike."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TEXT | FIELDS[family] | fields)
    model = getattr(transformers, MODELS.get(family, f"{family}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def padded(sequences=3, length=11):
    """Tokens and a mask with padding on the left."""
    ids = torch.randint(3, 101, (sequences, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for i in range(sequences):
        mask[i, : (5 * i) % 7] = 0
    return ids, mask
