"""Learns the rounding of weights: AdaRound layer by layer, BRECQ block by block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dybit.layers import Quantized
from dybit.ptq.lockstep import Call, Progress, correctable, walk
from dybit.ptq.moments import Moments, measure
from dybit.ptq.updown import descend, neighbours, spread_units
from dybit.ptq.statistics import set_bias_
from dybit.scale import Scales
from dybit.tensor import encode_matrix

SWEEPS = 20
DAMP = 0.02
REFIT = 3
_SEED = 0x0DB17


def adaround_(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None
) -> nn.Module:
    layers = correctable(model, reference)
    generator = torch.Generator().manual_seed(_SEED)

    def visit(name: str, calls: list[Call], originals: list[Call]) -> None:
        layer, original = layers[name], reference.get_submodule(name)
        moments = measure(layer, original, calls, originals, generator)
        _round(layer, original, moments)

    walk(model, reference, layers, batches, visit, progress)
    return model


def _round(layer: Quantized, original: nn.Module, m: Moments) -> None:
    stored = layer.quantized_tensor()
    spec = stored.spec
    g, k = m.mean.shape
    shape = (g, -1, k)
    w = spec.to_matrix(original.get_parameter("weight").detach().float())
    h, c = regularized(m, w.view(shape))
    low, high = neighbours(w, stored)
    scale = spread_units(stored.scales(), spec).expand(w.shape)
    current = spec.to_matrix(stored.dequantize()) / scale
    up = (current - low).abs() > (current - high).abs()
    level = torch.where(up, high, low).view(shape)
    other = torch.where(up, low, high).view(shape)
    s = scale.reshape(shape)
    per_row = stored.scales().shape[0] > 1 and spec.scale in ("fp32", "bf16")
    new = stored.scales().clone()
    for _ in range(REFIT):
        value, alt = level * s, other * s
        grad = value @ h - c
        before = value.clone()
        value, grad = descend(value, alt, h, grad, SWEEPS)
        moved = value != before
        level, other = torch.where(moved, other, level), torch.where(moved, level, other)
        if per_row:
            num = (value * c).sum(2); den = (value * (grad + c)).sum(2)
            gain = torch.where(den > 0, num / den, 1.0).clamp(0.5, 2).flatten()
            gain = ((new * gain[:, None]).to(spec.scale_dtype).float() / new)[:, :1]
            new = (new * gain).to(spec.scale_dtype).float()
            s = s * gain.view(g, -1, 1)
    value = (level * s).reshape(w.shape)
    choice = stored.choices()
    tensor_scale = 1.0 if stored.tensor_scale is None else float(stored.tensor_scale)
    packed = encode_matrix(value, spec, Scales(new, choice, tensor_scale, 0.0))
    for suffix, buffer in packed.buffers().items():
        layer._buffers["weight" + suffix] = buffer
    bias = m.wanted - (value.double().view(shape) * m.mean[:, None]).sum(2)
    set_bias_(layer, bias.flatten())


def regularized(m: Moments, w: Tensor) -> tuple[Tensor, Tensor]:
    h, c = m.second, m.cross
    diag = h.diagonal(dim1=1, dim2=2)
    share = DAMP * (1 + h.shape[1] / m.count)
    extra = share * diag + 1e-4*diag.mean(1, keepdim=True)
    return h + torch.diag_embed(extra), c + w * extra[:, None]
