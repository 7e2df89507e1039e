"""Shared by the tests of several modules."""

import json
import shutil

import torch
import transformers

TEXT = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
MLP = {"intermediate_size": 96}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8, **MLP}
GROUPED = {"num_key_value_heads": 2}
CLIP = {
    "text_config": {**TEXT, **MLP, "hidden_size": 32, "eos_token_id": 2, "bos_token_id": 1},
    "vision_config": VISION,
    "projection_dim": 16,
}
WHISPER = {
    "vocab_size": 101, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 16,
    "num_mel_bins": 8, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
ARCHITECTURES = {
    "llama": ("Llama", {**TEXT, **MLP, **GROUPED}, "LlamaForCausalLM"),
    "llama_tied": ("Llama", {**TEXT, **MLP, **GROUPED, "tie_word_embeddings": True}, "LlamaForCausalLM"),
    "qwen": ("Qwen2", {**TEXT, **MLP, **GROUPED, "tie_word_embeddings": True}, "Qwen2ForCausalLM"),
    "mistral": ("Mistral", {**TEXT, **MLP, **GROUPED, "head_dim": 16}, "MistralForCausalLM"),
    "gemma": ("Gemma", {**TEXT, **MLP, "num_key_value_heads": 1, "head_dim": 16}, "GemmaForCausalLM"),
    "phi": ("Phi", {**TEXT, **MLP}, "PhiForCausalLM"),
    "gpt2": ("GPT2", {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
                      "eos_token_id": 2}, "GPT2LMHeadModel"),
    "bert": ("Bert", {**TEXT, **MLP}, "BertForMaskedLM"),
    "vit": ("ViT", VISION, "ViTForImageClassification"),
    "clip": ("CLIP", CLIP, "CLIPModel"),
    "whisper": ("Whisper", WHISPER, "WhisperForConditionalGeneration"),
    "mixtral": ("Mixtral", {**TEXT, **MLP, **GROUPED, "num_local_experts": 4}, "MixtralForCausalLM"),
    "qwen_moe": ("Qwen2Moe", {**TEXT, **MLP, **GROUPED, "num_experts": 4, "num_experts_per_tok": 3,
                              "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
                 "Qwen2MoeForCausalLM"),
    "gpt_oss": ("GptOss", {**TEXT, **MLP, **GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
                "GptOssForCausalLM"),
}  # fmt: skip


def build(name):
    config, fields, model = ARCHITECTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, f"{config}Config")(**fields)).eval()
    if made.can_generate():
        made.generation_config.pad_token_id = 0
    return made


def edited(stored, tmp_path, change):
    """A checkpoint whose configuration was changed."""
    folder = tmp_path / "edited"
    shutil.copytree(stored, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder
