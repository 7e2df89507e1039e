"""Turns a GGUF file of the Llama architecture into a transformers model and a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from dybit.demo import packages
from dybit.errors import DyBitError
from dybit.interchange.header import check_header

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Reader: TypeAlias = Any  # gguf.GGUFReader; neither gguf nor transformers has types
Untyped: TypeAlias = Any

# llama.cpp's names without block and suffix.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # token type of special tokens


@dataclass(frozen=True)
class Vocabulary:
    """The parts of a byte-level BPE tokenizer.

    Attributes:
        tokens: Tokens in the byte-level alphabet, by id.
        merges: Pairs of tokens, most frequent first.
        special: Tokens that are matched whole and never split.
    """

    tokens: list[str]
    merges: list[tuple[str, str]]
    special: list[str]


def read(path: Path) -> Reader:
    """Open a GGUF file; its tensors stay on disk.

    Args:
        path: The file.

    Returns:
        A ``gguf.GGUFReader``.

    Raises:
        CheckpointError: It is not a GGUF file, or its header announces more than it holds.
        MissingExtraError: If ``gguf`` is not installed.
    """
    gguf = packages.load("gguf")
    check_header(path, gguf.GGML_QUANT_SIZES)
    return gguf.GGUFReader(path)


def build(reader: Reader) -> nn.Module:
    """Dequantise the model.

    Args:
        reader: From :func:`read`.

    Returns:
        A transformers ``LlamaForCausalLM`` in FP32 and eval mode.

    Raises:
        DyBitError: If the file is of another architecture.
        MissingExtraError: If ``transformers`` is not installed.
    """
    transformers = packages.load("transformers")
    config = _config(reader, transformers)
    with torch.device("meta"):  # the weights below become the parameters, so there is never a second copy
        model: Any = transformers.LlamaForCausalLM(config)
    state = _weights(reader, config.num_attention_heads, config.num_key_value_heads)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are in no state dict
    result: nn.Module = model.eval()
    return result


def vocabulary(reader: Reader) -> Vocabulary:
    """Read the tokenizer's data.

    Args:
        reader: From :func:`read`.

    Returns:
        The vocabulary.

    Raises:
        DyBitError: If the tokenizer is not SmolLM's.
    """
    kind = _field(reader, "tokenizer.ggml.pre")
    if kind != "smollm":
        raise DyBitError(f"reader has the pre-tokenizer {kind!r}, but only 'smollm' is known.")
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges: list[str] = _field(reader, "tokenizer.ggml.merges")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    return Vocabulary(tokens, pairs, special)


def tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Make a byte-level BPE tokenizer that splits as SmolLM does.

    Args:
        vocabulary: From :func:`vocabulary`.

    Returns:
        A tokenizer that adds no special tokens by itself.

    Raises:
        MissingExtraError: If ``tokenizers`` is not installed.
    """
    package = packages.load("tokenizers")
    split = package.pre_tokenizers
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    result: Tokenizer = package.Tokenizer(package.models.BPE(vocab=ids, merges=vocabulary.merges))
    # Every digit is a token of its own; the rest is split by GPT-2's pattern.
    result.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    result.decoder = package.decoders.ByteLevel()
    result.add_special_tokens(
        [package.AddedToken(token, special=True, normalized=False) for token in vocabulary.special]
    )
    return result


def chat_template(reader: Reader) -> str:
    """Read the template, in Jinja's language, that turns a conversation into a prompt.

    Args:
        reader: From :func:`read`.

    Returns:
        The template, as transformers' tokenizers take it.

    Raises:
        DyBitError: If the file has none.
    """
    template: str = _field(reader, "tokenizer.chat_template")
    return template


def _field(reader: Reader, key: str) -> Untyped:
    field = reader.get_field(key)
    if field is None:
        raise DyBitError(f"reader has no metadata field {key!r}.")
    return field.contents()


def _config(reader: Reader, transformers: Untyped) -> Untyped:
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise DyBitError(f"reader has the architecture {architecture!r}, but only 'llama' is known.")
    theta = _field(reader, "llama.rope.freq_base")
    return transformers.LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=_field(reader, "llama.rope.dimension_count"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        dtype="float32",
    )


def _weights(reader: Reader, heads: int, kv_heads: int) -> dict[str, Tensor]:
    dequantize = packages.load("gguf.quants").dequantize
    state = {}
    for tensor in reader.tensors:
        rows = tensor.data  # (out, bytes of the quantised inputs), or (out,) for a norm
        name = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if name in ("attn_q", "attn_k"):
            rows = _rotary_order(rows, heads if name == "attn_q" else kv_heads)
        # np.array copies: norms come back as a view of the file.
        state[_key(tensor.name)] = torch.from_numpy(np.array(dequantize(rows, tensor.tensor_type)))
    return state


def _rotary_order(rows: Untyped, heads: int) -> Untyped:
    """Undo llama.cpp's order of the query and key rows.

    It interleaves the two halves of each head, because it rotates neighbours (2i, 2i + 1) where transformers
    rotates (i, i + width / 2). Rows can be moved before they are dequantised.
    """
    paired = rows.reshape(heads, -1, 2, rows.shape[-1])  # (heads, width / 2, 2, bytes)
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _key(name: str) -> str:
    """The transformers name of a llama.cpp tensor, such as ``blk.3.attn_q.weight``."""
    stem, _, suffix = name.rpartition(".")
    prefix, _, last = stem.rpartition(".")
    block = prefix.replace("blk.", "model.layers.") + "." if prefix else ""
    return f"{block}{_NAMES[last]}.{suffix}"
