"""Experts of transformers written out, so that every product is a function call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dybit.layers.kinds import expert_kind, expert_weights
from dybit.operators.experts import mix

#: Multiplies rows (n, columns) by the matrices of their experts (n,), in the weight of a given name.
Product = Callable[[str, Tensor, Tensor], Tensor]


def run_experts(module: nn.Module, product: Product, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    """Computes the forward of a module of experts.

    Args:
        module: The module; its weights are not read.
        product: Called for every product.
        *args: Arguments of the module's forward (see :func:`dybit.layers.kinds.expert_kind`).
        **kwargs: Keyword arguments of the module's forward.

    Returns:
        The results of the module's forward.
    """
    given = [*args, *kwargs.values()]
    kinds: dict[str, Callable[..., Tensor]] = {"routed": _routed, "sorted": _sorted, "counted": _counted}
    return kinds[expert_kind(module)](module, product, *given)


def _routed(module: Any, product: Product, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # noqa: ANN401
    up, down = expert_weights(module)
    norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else lambda x: x
    return mix(
        lambda x, expert: _biased(module, up, product(up, x, expert), expert),
        module._apply_gate if getattr(module, "has_gate", True) else module.act_fn,
        lambda x, expert: norm(_biased(module, down, product(down, x, expert), expert)),
        hidden_states,
        index,
        weights,
    )


def _biased(module: nn.Module, name: str, y: Tensor, expert: Tensor) -> Tensor:
    """Adds the bias of every row's expert; rows with an expert out of range get none."""
    bias = module._parameters.get(f"{name}_bias")
    if bias is None:
        return y
    return y + nn.functional.pad(bias, (0, 0, 0, 1))[expert.clamp(max=bias.shape[0])].to(y.dtype)


def _sorted(module: Any, product: Product, hidden_states: Tensor) -> Tensor:  # noqa: ANN401
    up, down = expert_weights(module)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    expert = torch.arange(module.num_experts, dtype=torch.int64, device=rows.device).repeat_interleave(
        rows.shape[0] // module.num_experts
    )
    gate, value = product(up, rows, expert).chunk(2, dim=-1)
    return product(down, value * module.act_fn(gate), expert)


def _counted(module: Any, product: Product, inputs: Tensor, sizes: Any) -> Tensor:  # noqa: ANN401
    counts = torch.as_tensor(sizes, dtype=torch.int64, device=inputs.device)
    expert = torch.arange(module.num_experts, dtype=torch.int64, device=inputs.device).repeat_interleave(counts)
    return product("weight", inputs, expert)
