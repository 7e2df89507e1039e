"""Multi-head attention written out, so that its output projection is called as a module.

``nn.MultiheadAttention`` reads the weight of ``out_proj`` without calling it, so its input could not be observed or
rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    round_input: Callable[[Tensor], Tensor] = lambda x: x,
    project: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes ``nn.MultiheadAttention.forward``.

    Takes its arguments; ``round_input``, which is applied to query, key and value; and ``project``, which computes the
    products of the three with their weights, (batch, length, embed_dim), in place of torch. Returns its results.

    Raises:
        ValueError: ``is_causal`` without ``attn_mask``, as in torch.
    """
    if is_causal and attn_mask is None:
        raise ValueError("need attn_mask if specifying the is_causal hint")
    batched = query.ndim == 3

    def lead(x: Tensor) -> Tensor:
        x = round_input(x)
        return x.unsqueeze(0) if not batched else x if module.batch_first else x.transpose(0, 1)

    led: dict[int, Tensor] = {}  # by the tensor given: of a sequence to itself, the three are one
    q, k, v = (led[id(x)] if id(x) in led else led.setdefault(id(x), lead(x)) for x in (query, key, value))
    if not batched:
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    q, k, v = _project(module, q, k, v) if project is None else project(q, k, v)
    k, v = _lengthen(module, k, v)
    extra = (module.bias_k is not None) + module.add_zero_attn
    mask = _mask(attn_mask, key_padding_mask, q.shape[0], module.num_heads, extra, q.dtype)
    dropout = module.dropout if module.training else 0.0
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    weights = None
    if need_weights:
        scores = q * math.sqrt(1.0 / q.shape[-1]) @ k.transpose(-2, -1)
        weights = functional.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
        mixed = weights @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
    output = module.out_proj(mixed.transpose(1, 2).flatten(2))
    if not batched:
        return output.squeeze(0), None if weights is None else weights.squeeze(0)
    return output if module.batch_first else output.transpose(0, 1), weights


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Returns query, key and value: (batch, length, embed_dim)."""
    if module._qkv_same_embed_dim:
        weights = list(module.in_proj_weight.chunk(3))
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    biases = [None] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.chunk(3))
    return [functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


def _lengthen(module: nn.MultiheadAttention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the learned position, if there is one."""
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(k.shape[0], 1, -1)], dim=1)
        v = torch.cat([v, module.bias_v.expand(v.shape[0], 1, -1)], dim=1)
    return k, v


def _mask(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, extra: int, dtype: torch.dtype
) -> Tensor | None:
    """Combines both masks into one additive mask that broadcasts to (batch, heads, queries, keys + extra)."""
    total = None
    for mask, shape in ((attn_mask, None), (padding, (batch, 1, 1, -1))):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
        mask = functional.pad(mask, (0, extra))
        if shape is not None:
            mask = mask.view(shape)
        elif mask.ndim == 3:
            mask = mask.view(batch, heads, *mask.shape[1:])
        total = mask if total is None else total + mask
    return total
