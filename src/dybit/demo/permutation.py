"""Shuffles the channels of a Llama model without changing what it computes."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Untyped: TypeAlias = Any  # parts of a transformers model


@torch.no_grad()
def permute_channels_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Permute residual, feed-forward and value channels, in place.

    Query and key channels stay: the rotary embedding gives each its own frequency. A value channel stays
    inside its head, and all query heads that share a key-value head read it in the same new order.

    Args:
        model: A transformers ``LlamaForCausalLM``.
        seed: Seed of the permutations.

    Returns:
        The same model. Its logits change only by rounding; tied embeddings stay tied.
    """
    llama: Untyped = model
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randperm(llama.config.hidden_size, generator=generator, dtype=torch.int64, device="cpu")
    _take(llama.model.embed_tokens.weight, 1, residual)
    if llama.lm_head.weight is not llama.model.embed_tokens.weight:
        _take(llama.lm_head.weight, 1, residual)
    _take(llama.model.norm.weight, 0, residual)
    for layer in llama.model.layers:
        _permute_attention(layer.self_attn, residual, generator)
        _permute_feed_forward(layer.mlp, residual, generator)
        _take(layer.input_layernorm.weight, 0, residual)
        _take(layer.post_attention_layernorm.weight, 0, residual)
    return model


def _permute_attention(attention: Untyped, residual: Tensor, generator: torch.Generator) -> None:
    width, shared = attention.head_dim, attention.num_key_value_groups
    kv_heads = attention.v_proj.out_features // width
    within = torch.stack(
        [torch.randperm(width, generator=generator, dtype=torch.int64, device="cpu") for _ in range(kv_heads)]
    )
    values = within + width * torch.arange(kv_heads, dtype=torch.int64, device="cpu").unsqueeze(
        1
    )  # output channels of v_proj
    starts = width * torch.arange(kv_heads * shared, dtype=torch.int64, device="cpu").unsqueeze(1)
    outputs = starts + within.repeat_interleave(shared, dim=0)  # (heads, width): input channels of o_proj
    _reorder(attention.q_proj, None, residual)
    _reorder(attention.k_proj, None, residual)
    _reorder(attention.v_proj, values.flatten(), residual)
    _reorder(attention.o_proj, residual, outputs.flatten())


def _permute_feed_forward(mlp: Untyped, residual: Tensor, generator: torch.Generator) -> None:
    hidden = torch.randperm(mlp.down_proj.in_features, generator=generator, dtype=torch.int64, device="cpu")
    _reorder(mlp.gate_proj, hidden, residual)
    _reorder(mlp.up_proj, hidden, residual)
    _reorder(mlp.down_proj, residual, hidden)


def _reorder(linear: nn.Linear, outputs: Tensor | None, inputs: Tensor) -> None:
    _take(linear.weight, 1, inputs)
    if outputs is not None:
        _take(linear.weight, 0, outputs)
        if linear.bias is not None:
            _take(linear.bias, 0, outputs)


def _take(parameter: Tensor, dim: int, order: Tensor) -> None:
    parameter.data = parameter.data.index_select(dim, order)  # same Parameter, so ties survive
