"""Learns the rounding of some layers by gradients: which code every weight takes, gains of scales, and biases.

Must not know what the layers are part of, nor what makes their outputs good: a loss says that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dybit.layers import Quantized, set_bias_
from dybit.ptq.flips import Candidates
from dybit.ptq.reconstruct import store_
from dybit.ptq.statistics import has_row_scales, stretch_

_RATE = 0.003  # of choices, which go from 0 (down) to 1 (up)
_FINE_RATE = 0.001  # of gains and biases, relative to the spread of the outputs
_MARGIN = 0.1  # how far from a half a choice starts at least, so that it is not undone by the first steps


def learn_(
    parts: Iterable[tuple[Quantized, nn.Module]],
    loss: Callable[[int], Tensor],
    count: int,
    error: Callable[[], float],
    *,
    steps: int,
    generator: torch.Generator,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Learns by Adam, with the straight-through estimator for choices, from where the layers are.

    Args:
        parts: Quantized layers, changed in place, each with its floating-point original.
        loss: Of one of ``count`` pieces of data, a scalar with gradients; it runs the layers.
        count: How many pieces there are.
        error: What is to become smaller, without gradients. Where it does not, layers are left as they were.
        steps: One piece of data each.
        generator: For the order of the data.
        progress: Called with the number of every step, from 0.

    Returns:
        Whether the error has become smaller.
    """
    before = error()
    pairs = list(parts)
    learners = [_Learner(*part) for part in pairs]
    choices, fine = zip(*(learner.parameters() for learner in learners), strict=True)
    optimizer = torch.optim.Adam(
        [{"params": choices, "lr": _RATE}, {"params": [p for some in fine for p in some], "lr": _FINE_RATE}]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    with torch.enable_grad(), _learning(learners):
        for step in range(steps):
            if progress:
                progress(step)
            if step % count == 0:
                order = torch.randperm(count, generator=generator).tolist()
            optimizer.zero_grad()
            loss(order[step % count]).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for choice in choices:
                    choice.clamp_(0, 1)
    kept = [(dict(layer._buffers), dict(layer._parameters), layer.added_bias) for layer, _ in pairs]
    for learner in learners:
        learner.store()
    if error() < before:
        return True
    for (layer, _), (buffers, parameters, added) in zip(pairs, kept, strict=True):
        layer._buffers.update(buffers)
        layer._parameters.update(parameters)
        layer.added_bias = added
    return False


class _Learner:
    """One layer while its rounding is learned: it runs as a floating-point layer with a weight that is made anew."""

    def __init__(self, layer: Quantized, original: nn.Module) -> None:
        self.layer = layer
        self.spec = layer.weight_specs["weight"]
        matrix = self.spec.to_matrix(original.get_parameter("weight").detach().float())
        self.candidates = Candidates.of(matrix, layer.quantized_tensor())
        self.up = self.candidates.now > self.candidates.other
        self.low = torch.minimum(self.candidates.now, self.candidates.other)
        self.span = (self.candidates.now - self.candidates.other).abs()
        share = self.candidates.share
        self.place = torch.where(self.up, share.clamp(min=0.5 + _MARGIN), share.clamp(max=0.5 - _MARGIN))
        self.gain = torch.ones(self.spec.rows, 1)
        bias = layer._parameters.get("bias")
        self.bias = torch.zeros(self.spec.rows) if bias is None else bias.detach().float().clone()
        self.stretching = has_row_scales(layer)
        self.proxy = copy.deepcopy(original).requires_grad_(False)
        for name in ("weight", "bias"):
            self.proxy._parameters.pop(name, None)

    def parameters(self) -> tuple[Tensor, list[Tensor]]:
        """The choices, and the finer parameters."""
        fine = [self.gain, self.bias] if self.stretching else [self.bias]
        for tensor in (self.place, *fine):
            tensor.requires_grad_()
        return self.place, fine

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the layer's own signature
        """What the layer computes, with gradients for the parameters."""
        # Rounded, with the gradient of what is rounded.
        choice = self.place + ((self.place >= 0.5).float() - self.place).detach()
        matrix = (self.low + choice * self.span) * self.candidates.scale * self.gain
        proxy: Any = self.proxy
        proxy.weight, proxy.bias = self.spec.from_matrix(matrix), self.bias
        args = tuple(self.layer.round_input(x) if i == 0 else x for i, x in enumerate(args))
        return proxy(*args, **kwargs)

    def store(self) -> None:
        """Gives the layer what was learned."""
        self.candidates.flip((self.place.detach() >= 0.5) != self.up)
        if self.stretching:
            stretch_(self.layer, self.gain.detach().flatten().double())
        store_(self.layer, self.candidates.now)
        set_bias_(self.layer, self.bias.detach())


@contextmanager
def _learning(learners: list[_Learner]) -> Iterator[None]:
    """Lets the learners stand in for their layers."""
    for learner in learners:
        learner.layer.forward = learner.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for learner in learners:
            del learner.layer.__dict__["forward"]
