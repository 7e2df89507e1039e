import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dybit.demo import gguf_llama
from dybit.errors import DyBitError

HEADS, KV_HEADS = 4, 2
GGUF_NAMES = {value: key for key, value in gguf_llama._NAMES.items()}


def llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight, heads):
    """The order in which llama.cpp's converter stores query and key rows."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(model, path, architecture="llama"):
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_uint32("llama.vocab_size", config.vocab_size)
    writer.add_uint32("llama.embedding_length", config.hidden_size)
    writer.add_uint32("llama.feed_forward_length", config.intermediate_size)
    writer.add_uint32("llama.block_count", config.num_hidden_layers)
    writer.add_uint32("llama.attention.head_count", HEADS)
    writer.add_uint32("llama.attention.head_count_kv", KV_HEADS)
    writer.add_uint32("llama.rope.dimension_count", config.hidden_size // HEADS)
    writer.add_uint32("llama.context_length", config.max_position_embeddings)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", 500.0)
    for number, name in enumerate(("bos", "eos", "padding")):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.add_string("tokenizer.ggml.pre", "llama-bpe")
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = value.numpy()
        if "q_proj" in key or "k_proj" in key:
            weight = interleaved(weight, HEADS if "q_proj" in key else KV_HEADS)
        block, name = "", key.removesuffix(".weight")
        if name.startswith("model.layers."):
            _, _, number, name = name.split(".", 3)
            block = f"blk.{number}."
        writer.add_tensor(f"{block}{GGUF_NAMES[name]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_a_written_model_reads_back_exactly(tmp_path, tied):
    original = llama(tied)
    write(original, tmp_path / "model.gguf")
    model = gguf_llama.build(gguf_llama.read(tmp_path / "model.gguf"))
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.model.norm.weight.mul_(2)  # a parameter must not be a view of the file


def test_rejects_other_architectures_and_tokenizers(tmp_path):
    write(llama(True), tmp_path / "model.gguf", architecture="gemma")
    reader = gguf_llama.read(tmp_path / "model.gguf")
    with pytest.raises(DyBitError, match="architecture 'gemma'"):
        gguf_llama.build(reader)
    with pytest.raises(DyBitError, match="pre-tokenizer 'llama-bpe'"):
        gguf_llama.vocabulary(reader)
    with pytest.raises(DyBitError, match=r"tokenizer\.chat_template"):
        gguf_llama.chat_template(reader)


def test_tokenizer_applies_merges_and_keeps_special_tokens():
    tokens, merges = ["<|x|>", "a", "b", "ab", "Ġ", "Ġa", "1"], [("a", "b"), ("Ġ", "a")]
    tokenizer = gguf_llama.tokenizer(gguf_llama.Vocabulary(tokens, merges, special=["<|x|>"]))
    assert tokenizer.encode("ab a11<|x|>").tokens == ["ab", "Ġa", "1", "1", "<|x|>"]
