"""A tiny language model with a tokenizer, saved for transformers."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dybit
from dybit.integrations.transformers import attach_

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"


def save(folder, template=TEMPLATE):
    """Writes a quantized model and its tokenizer."""
    words = ["<end>", "<unknown>", "user", "assistant", *(f"w{i}" for i in range(28))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", chat_template=template).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    recipe = dybit.Recipe(weights=4, group_size=16, method="absmax")
    attach_(dybit.quantize_(model, recipe)).save_pretrained(folder)
    return model
