"""BRECQ prototype."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dybit.fidelity import output_tensor
from dybit.layers import Quantized
from dybit.ptq.lockstep import Call, Progress, correctable, walk
from dybit.ptq.moments import measure
from dybit.ptq.reconstruct import _round
from dybit.ptq.updown import neighbours, spread_units
from dybit.ptq.statistics import set_bias_
from dybit.scale import Scales
from dybit.tensor import encode_matrix

STEPS = 200
LR = 0.005
LRB = 0.002
_SEED = 0x0DB17
LOG = False


def find_blocks(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    names = list(names)
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        for child, _ in module.named_children():
            path = f"{name}.{child}" if name else child
            inside = [n for n in names if n.startswith(path + ".")]
            if len(inside) > 1:
                found[path] = inside
    return {p: i for p, i in found.items() if not any(o.startswith(p + ".") for o in found)}


class _Learner:
    def __init__(self, layer: Quantized, original: nn.Module) -> None:
        self.layer = layer
        stored = layer.quantized_tensor()
        self.stored, spec = stored, stored.spec
        w = spec.to_matrix(original.get_parameter("weight").detach().float())
        self.scale = spread_units(stored.scales(), spec)
        self.low, self.high = neighbours(w, stored)
        now = spec.to_matrix(stored.dequantize()) / self.scale
        up = (now - self.low).abs() > (now - self.high).abs()
        t = ((w / self.scale - self.low) / (self.high - self.low)).clamp(0, 1)
        self.v = torch.where(up, t.clamp(min=0.6), t.clamp(max=0.4)).requires_grad_()
        self.gain = torch.ones(spec.rows, 1).requires_grad_()
        self.proxy = copy.deepcopy(original)
        for p in self.proxy.parameters():
            p.requires_grad_(False)
        del self.proxy._parameters["weight"]
        bias = layer._parameters.get("bias")
        b = torch.zeros(spec.rows) if bias is None else bias.detach().clone().float()
        self.proxy._parameters["bias"] = nn.Parameter(b)
        self.can_gain = stored.scales().shape[0] > 1 and spec.scale in ("fp32", "bf16")

    def hard(self) -> Tensor:
        return torch.where(self.v >= 0.5, self.high, self.low)

    def weight(self) -> Tensor:
        span = self.high - self.low
        soft = self.v * span
        value = soft + (self.hard() - soft).detach()
        g = self.gain if self.can_gain else 1.0
        return self.stored.spec.from_matrix(value * self.scale * g)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.proxy.weight = self.weight()
        return self.proxy(*args, **kwargs)

    def store(self) -> None:
        spec = self.stored.spec
        new = self.stored.scales()
        if self.can_gain:
            new = (new * self.gain.detach()).to(spec.scale_dtype).float()
        ts = 1.0 if self.stored.tensor_scale is None else float(self.stored.tensor_scale)
        packed = encode_matrix(self.hard() * spread_units(new, spec), spec, Scales(new, self.stored.choices(), ts, 0.0))
        for suffix, buffer in packed.buffers().items():
            self.layer._buffers["weight" + suffix] = buffer
        set_bias_(self.layer, self.proxy._parameters["bias"].detach())


def brecq_(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None
) -> nn.Module:
    layers = correctable(model, reference)
    blocks = find_blocks(model, layers)
    inner = {n for part in blocks.values() for n in part}
    generator = torch.Generator().manual_seed(_SEED)

    def visit(name: str, calls: list[Call], originals: list[Call]) -> None:
        original = reference.get_submodule(name)
        if name in blocks:
            learners = [_Learner(layers[n], reference.get_submodule(n)) for n in blocks[name]]
            _learn(name, model.get_submodule(name), original, learners, calls, originals, generator)
        else:
            _round(layers[name], original, measure(layers[name], original, calls, originals, generator))

    walk(model, reference, [*blocks, *(n for n in layers if n not in inner)], batches, visit, progress)
    return model


def _learn(name, block, original, learners, calls, originals, generator):
    targets = [output_tensor(original.forward(*c.args, **c.kwargs)) for c in originals]
    size = sum(float((t - t.mean()).square().mean()) for t in targets) / len(targets)
    before = sum(float((output_tensor(block.forward(*c.args, **c.kwargs)) - t).square().mean()) for c, t in zip(calls, targets)) / len(targets) / size
    opt = torch.optim.Adam([
        {"params": [l.v for l in learners], "lr": LR},
        {"params": [l.gain for l in learners] + [l.proxy._parameters["bias"] for l in learners], "lr": LRB},
    ], betas=(0.9, 0.95))
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1 - i / STEPS)
    for l in learners:
        l.layer.forward = l.forward
    order = []
    first = []; 
    with torch.enable_grad():
        for step in range(STEPS):
            if not order:
                order = torch.randperm(len(calls), generator=generator).tolist()
            i = order.pop()
            y = output_tensor(block.forward(*calls[i].args, **calls[i].kwargs))
            loss = (y - targets[i]).square().mean() / size
            opt.zero_grad(); loss.backward(); opt.step(); sched.step()
            with torch.no_grad():
                for l in learners: l.v.clamp_(0, 1)
    for l in learners:
        del l.layer.__dict__["forward"]
        l.store()
    after = sum(float((output_tensor(block.forward(*c.args, **c.kwargs)) - t).square().mean()) for c, t in zip(calls, targets)) / len(targets) / size
    if LOG: print(name, f"{before:.4f} -> {after:.4f}", flush=True)
