"""Cross-layer equalization: moves factors between layers until their channels have the same range on both sides.

M. Nagel et al., "Data-free quantization through weight equalization and bias correction", ICCV 2019, equation 11. Must
not know formats or recipes.

Where the activation between two layers is cut (ReLU6), the cut has to move with the channels: the producer gets a limit
for every channel, of which the activation itself keeps no more than the largest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dybit.models.running import Progress
from dybit.ptq.transforms.factors import input_range, move_limit_, outputs_first, scale_
from dybit.ptq.transforms.links import Link, find_links
from dybit.ptq.transforms.preserve import preserving

_SWEEPS = 50
_CONVERGED = 1.01  # the largest factor of a sweep that is worth no other


def equalize_(
    model: nn.Module, names: Collection[str], batches: Sequence[Any], *, progress: Progress | None = None
) -> None:
    """Equalizes the ranges of the channels between layers, in place; the model computes what it did.

    Pairs of linear layers or convolutions are treated whose channels go through ReLU, LeakyReLU, ReLU6, pooling,
    attention weights or gates only (:mod:`dybit.ptq.transforms.links`). Chains of pairs, such as convolution, depthwise
    convolution, convolution, are swept until they converge. A pair that is not understood is left alone.

    Args:
        model: A floating-point model, its batch norms folded.
        names: The layers that may be changed.
        batches: Calibration batches, of which the first is used: to find the pairs and to check the result.
        progress: Called with (done, total, text).
    """
    batch = batches[0]
    allowed = set(names)
    links = [
        link for link in find_links(model, batch) if not link.is_norm and {link.producer, *link.readers} <= allowed
    ]
    if not links:
        return
    changed = {name for link in links for name in (link.producer, *link.readers)}
    with preserving(model, changed, batch, "equalize"):
        total = {link.producer: torch.ones(link.channels, dtype=torch.float32, device="cpu") for link in links}
        for sweep in range(_SWEEPS):
            largest = 1.0
            for link in links:
                factor = _factor(model, link)
                scale_(model, link, factor)
                total[link.producer] = total[link.producer].to(factor) * factor
                largest = max(largest, float(factor.max()), float(1 / factor.min()))
            if progress:
                progress(sweep, _SWEEPS, f"channels off by up to {100 * (largest - 1):.0f} %")
            if largest < _CONVERGED:
                break
        for link in links:
            move_limit_(model, link, total[link.producer])


def _factor(model: nn.Module, link: Link) -> Tensor:
    """√(output range / input range), by which outputs are divided and what reads them is multiplied: (channels,)."""
    producer = model.get_submodule(link.producer)
    weight = outputs_first(producer, producer._parameters["weight"])  # type: ignore[arg-type]
    outputs = weight.abs().flatten(1).amax(1).float()
    inputs = input_range(model, link)
    factor = (outputs / inputs).sqrt()
    return torch.where((outputs > 0) & (inputs > 0), factor, 1.0)
