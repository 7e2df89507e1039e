"""Experts as transformers marks them, without transformers."""

import torch
from torch import nn


class Mixture(nn.Module):
    """Experts as transformers marks them."""

    def __init__(self, gate=True, transposed=False, bias=False, norm=False, sizes=(16, 12)):
        super().__init__()
        self.has_gate, self.is_transposed, self.has_bias, self.has_post_expert_norm = gate, transposed, bias, norm
        self.first = "gate_up_proj" if gate else "up_proj"
        wide, inside = sizes
        for name, rows, columns in ((self.first, inside * (1 + gate), wide), ("down_proj", wide, inside)):
            weight = torch.randn(4, rows, columns)
            self.register_parameter(name, nn.Parameter(weight.mT.contiguous() if transposed else weight))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(4, rows)))
        self.act_fn = nn.SiLU()
        if norm:
            self.post_expert_norm = nn.LayerNorm(wide)

    def _apply_gate(self, x):
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def multiply(self, name, number, state):
        matrix = getattr(self, name)[number]
        y = (matrix.T if self.is_transposed else matrix) @ state
        return y + getattr(self, f"{name}_bias")[number] if self.has_bias else y

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for i, state in enumerate(hidden_states):
            for number, weight in zip(top_k_index[i], top_k_weights[i], strict=True):
                first = self.multiply(self.first, number, state)
                y = self.multiply("down_proj", number, (self._apply_gate if self.has_gate else self.act_fn)(first))
                out[i] += weight * (self.post_expert_norm(y) if self.has_post_expert_norm else y)
        return out
