"""Quantizes architectures of transformers while loading, and by ``quantize_``: both must give the same; `make fuzz`.

Every model is tiny and random. It is saved in floating point, quantized by ``from_pretrained``, saved and loaded again;
its outputs must be those of ``quantize_`` on the loaded model. What cannot be so must be refused in one sentence.
"""

import argparse
import copy
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
import transformers
from torch import nn

import dybit
from dybit.models.preparation import folded_pairs

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
OLD = {
    "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SEQ = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "init_std": 0.3,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "num_channels": 3, "num_labels": 5,
}  # fmt: skip
SPEECH = {
    **TEXT, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "group",
}  # fmt: skip
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "embedding_size": 16, "num_labels": 5}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Class of the configuration: class of the model, its fields, kind of its input.
ARCHITECTURES = {
    "Albert": ("AlbertForMaskedLM", {**TEXT, "embedding_size": 16}, "text"),
    "AriaText": ("AriaTextForCausalLM", {**TEXT, "moe_num_experts": 4, "moe_topk": 2}, "text"),
    "BioGpt": ("BioGptForCausalLM", TEXT, "text"),
    "Bloom": ("BloomForCausalLM", {**OLD, "hidden_size": 32}, "text"),
    "Camembert": ("CamembertForMaskedLM", TEXT, "text"),
    "CodeGen": ("CodeGenForCausalLM", {**OLD, "n_ctx": 64, "rotary_dim": 4}, "text"),
    "Cohere": ("CohereForCausalLM", TEXT, "text"),
    "ConvBert": ("ConvBertForMaskedLM", {**TEXT, "embedding_size": 32, "head_ratio": 2}, "text"),
    "ConvNext": ("ConvNextForImageClassification", STAGES, "image"),
    "Deberta": ("DebertaForMaskedLM", TEXT, "text"),
    "DebertaV2": ("DebertaV2ForMaskedLM", TEXT, "text"),
    "DeiT": ("DeiTForImageClassification", IMAGE, "image"),
    "Dinov2": ("Dinov2ForImageClassification", IMAGE, "image"),
    "DistilBert": ("DistilBertForMaskedLM", {**TEXT, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, "text"),
    "Electra": ("ElectraForMaskedLM", {**TEXT, "embedding_size": 16}, "text"),
    "Falcon": ("FalconForCausalLM", {key: value for key, value in TEXT.items() if key != "head_dim"}, "text"),
    "FNet": ("FNetForMaskedLM", TEXT, "text"),
    "Gemma2": ("Gemma2ForCausalLM", TEXT, "text"),
    "Gemma3Text": ("Gemma3ForCausalLM", TEXT, "text"),
    "Glm": ("GlmForCausalLM", TEXT, "text"),
    "GPTBigCode": ("GPTBigCodeForCausalLM", OLD, "text"),
    "GPTJ": ("GPTJForCausalLM", {**OLD, "rotary_dim": 4}, "text"),
    "GPTNeoX": ("GPTNeoXForCausalLM", TEXT, "text"),
    "Granite": ("GraniteForCausalLM", TEXT, "text"),
    "GraniteMoe": ("GraniteMoeForCausalLM", {**TEXT, **MOE}, "text"),
    "Hubert": ("HubertForCTC", SPEECH, "speech"),
    "JetMoe": ("JetMoeForCausalLM", {**TEXT, **MOE, "kv_channels": 8, "num_attention_heads": 4}, "text"),
    "Llama4Text": ("Llama4ForCausalLM", {**TEXT, **MOE, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}, "text"),
    "Mamba": ("MambaForCausalLM", {**TEXT, "state_size": 4}, "text"),
    "Marian": ("MarianMTModel", SEQ, "pair"),
    "MBart": ("MBartForConditionalGeneration", SEQ, "pair"),
    "MobileNetV2": ("MobileNetV2ForImageClassification", {"image_size": 32, "num_labels": 5}, "large"),
    "MobileViT": (
        "MobileViTForImageClassification",
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
            "image_size": 64,
            "num_labels": 5,
            "num_attention_heads": 4,
        },
        "large",
    ),
    "ModernBert": ("ModernBertForMaskedLM", {**TEXT, "global_attn_every_n_layers": 2}, "text"),
    "Mpt": (
        "MptForCausalLM",
        {"vocab_size": 99, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "text",
    ),
    "MPNet": ("MPNetForMaskedLM", TEXT, "text"),
    "Nemotron": ("NemotronForCausalLM", TEXT, "text"),
    "Olmo2": ("Olmo2ForCausalLM", TEXT, "text"),
    "Olmoe": ("OlmoeForCausalLM", {**TEXT, **MOE}, "text"),
    "OPT": ("OPTForCausalLM", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}, "text"),
    "Pegasus": ("PegasusForConditionalGeneration", SEQ, "pair"),
    "Persimmon": ("PersimmonForCausalLM", TEXT, "text"),
    "Phi3": ("Phi3ForCausalLM", TEXT, "text"),
    "PoolFormer": (
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_labels": 5},
        "large",
    ),
    "Pvt": (
        "PvtForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "num_labels": 5,
        },
        "large",
    ),
    "Qwen3": ("Qwen3ForCausalLM", TEXT, "text"),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", {**TEXT, **MOE}, "text"),
    "RegNet": ("RegNetForImageClassification", {**STAGES, "groups_width": 8}, "large"),
    "RemBert": ("RemBertForMaskedLM", {**TEXT, "input_embedding_size": 16, "output_embedding_size": 24}, "text"),
    "ResNet": ("ResNetForImageClassification", STAGES, "large"),
    "Roberta": ("RobertaForMaskedLM", TEXT, "text"),
    "RoFormer": ("RoFormerForMaskedLM", {**TEXT, "embedding_size": 32}, "text"),
    "Rwkv": ("RwkvForCausalLM", {**TEXT, "attention_hidden_size": 32, "context_length": 64}, "text"),
    "Segformer": (
        "SegformerForImageClassification",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4], "num_labels": 5},
        "large",
    ),
    "SmolLM3": ("SmolLM3ForCausalLM", TEXT, "text"),
    "StableLm": ("StableLmForCausalLM", TEXT, "text"),
    "Starcoder2": ("Starcoder2ForCausalLM", TEXT, "text"),
    "Swin": (
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 5,
        },
        "small",
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "pair",
    ),
    "UniSpeech": ("UniSpeechForCTC", SPEECH, "speech"),
    "Wav2Vec2": ("Wav2Vec2ForCTC", SPEECH, "speech"),
    "XGLM": (
        "XGLMForCausalLM",
        {
            "vocab_size": 99,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
        },
        "text",
    ),
    "XLMRoberta": ("XLMRobertaForMaskedLM", TEXT, "text"),
    "XLNet": ("XLNetLMHeadModel", {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "text"),
    "Yolos": ("YolosForObjectDetection", {**IMAGE, "image_size": [16, 16], "num_detection_tokens": 4}, "image"),
}


def build(name):
    """A tiny model of an architecture, at random, its norms and biases included."""
    torch.manual_seed(0)
    cls, fields, _ = ARCHITECTURES[name]
    model = getattr(transformers, cls)(getattr(transformers, f"{name}Config")(**fields)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1)
    return model


def outputs(model, name):
    """The logits of a model for fixed inputs."""
    generator, kind = torch.Generator().manual_seed(1), ARCHITECTURES[name][2]
    if kind in ("text", "pair"):
        ids = torch.randint(3, 99, (2, 12), generator=generator)
        given = {"input_ids": ids} if kind == "text" else {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    elif kind == "speech":
        given = {"input_values": torch.randn(2, 2000, generator=generator)}
    else:
        size = {"image": 16, "small": 32, "large": 64}[kind]
        given = {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    with torch.no_grad():
        return model(**given).logits


def check(name):
    """Whether an architecture is right: ``equal``, in which way it is not, or the sentence by which it is refused.

    Raises:
        Exception: It is neither.
    """
    cls = type(model := build(name))
    fields = {"weights": 4, "group_size": 8, "scale": "fp32"}  # others are rounded, before or after norms are folded
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(f"{folder}/float")
        floating = cls.from_pretrained(f"{folder}/float").eval()
        expected = dybit.quantize_(copy.deepcopy(floating), dybit.Recipe(**fields))
        try:
            loaded = cls.from_pretrained(f"{folder}/float", quantization_config=dybit.DyBitConfig(**fields)).eval()
        except dybit.DyBitError as error:
            return f"refused: {error}"
        names = [{n for n, m in found.named_modules() if hasattr(m, "weight_specs")} for found in (expected, loaded)]
        assert names[0] == names[1], f"not the same layers are quantized: {sorted(names[0] ^ names[1])[:3]}"
        y = outputs(expected, name)
        assert torch.isfinite(y).all() and not torch.equal(y, outputs(floating, name)), "nothing is quantized"
        found = outputs(loaded, name)
        difference = float((found - y).abs().max())
        folded = folded_pairs(expected)
        allowed = 1e-5 * float(y.abs().max()) if folded else 0
        assert difference <= allowed, f"loading gives other outputs, by {difference:.2g}"
        loaded.save_pretrained(f"{folder}/codes")
        again = cls.from_pretrained(f"{folder}/codes").eval()
        assert torch.equal(outputs(again, name), found), "what was saved gives other outputs"
    return "equal up to rounding: quantize_ folds batch norms, loading does not" if folded else "equal"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES))
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    failed = 0
    for name in parser.parse_args().names:
        try:
            result = check(name)
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            result = f"FAILED: {type(error).__name__}: {str(error)[:200]} ({place})"
        print(f"{name}: {result}", flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
