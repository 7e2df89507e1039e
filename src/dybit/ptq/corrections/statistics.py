"""Matches the mean and the variance of every output channel of a quantized model to the floating-point model's.

Rounding weights shifts the mean of a layer's outputs and stretches them, channel by channel, and in a deep
convolutional network these errors add up (Nagel et al., "Data-Free Quantization through Weight Equalization and Bias
Correction", ICCV 2019). Both can be undone at no cost: the stretch in the scales of the weights, the shift in the bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.layers.kinds import channel_dim
from dybit.layers.quantized import Quantized
from dybit.layers.swap import set_bias_
from dybit.models.running import Progress
from dybit.ptq.corrections.lockstep import Call, correctable, walk

_LARGEST_GAIN = 2.0  # beyond it, calibration saw too little of a channel
_LEAST_VARIANCE = 1e-6  # as a share of the mean over the layer's channels: below it, a channel is constant


def match_statistics_(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None
) -> nn.Module:
    """Gives every quantized layer's outputs the mean and variance, channel by channel, that the reference's have.

    Layers are corrected in order of execution, each for inputs that come through the corrected layers before it. The
    variance is matched by a gain in the scales of an output channel, where it has scales of its own in FP32 or BF16;
    the mean by the bias, which layers without one are given.

    Args:
        model: A quantized model, changed in place.
        reference: The same model in floating point, batch norms folded as in ``model``.
        batches: Calibration batches, each a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        progress: Called with (done, total, text) before every layer and after the last.

    Returns:
        The same model.

    Raises:
        DyBitError: There is no batch, one does not fit, outputs are not finite, or the models do not match.
    """
    return _correct(model, reference, batches, True, progress)


def correct_bias_(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None
) -> nn.Module:
    """As :func:`match_statistics_`, but matches the means only and leaves the weights as they are."""
    return _correct(model, reference, batches, False, progress)


def _correct(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], stretch: bool, progress: Progress | None
) -> nn.Module:
    layers = correctable(model, reference)

    def visit(name: str, calls: list[Call], originals: list[Call]) -> None:
        layer = layers[name]
        wanted_mean, wanted_variance = _moments(name, reference.get_submodule(name), originals)
        mean, variance = _moments(name, layer, calls)
        old = layer._parameters.get("bias")
        bias = torch.zeros_like(mean) if old is None else old.detach().double()
        gain = torch.ones_like(mean)
        if stretch and has_row_scales(layer):
            gain = stretch_(layer, _gain(wanted_variance, variance))
        # The outputs are now gain · (outputs - bias) + bias, since scales multiply all but the bias.
        set_bias_(layer, wanted_mean - gain * (mean - bias))

    walk(model, reference, layers, batches, visit, progress)
    return model


def _moments(name: str, layer: nn.Module, calls: list[Call]) -> tuple[Tensor, Tensor]:
    """Mean and variance of every output channel over all calls: float64."""
    means, squares, counts = [], [], []
    for call in calls:
        y = layer.forward(*call.args, **call.kwargs)
        flat = y.movedim(channel_dim(layer, y), 0).flatten(1).float()
        if not bool(torch.isfinite(flat.sum())):
            raise DyBitError(f"calibration gives layer {name!r} outputs with NaN or infinity")
        variance, mean = torch.var_mean(flat, dim=1, correction=0)
        means.append(mean.double())
        squares.append(variance.double() + mean.double().square())
        counts.append(flat.shape[1])
    share = torch.tensor(counts, dtype=torch.float64, device="cpu")[:, None] / max(1, sum(counts))
    mean = (torch.stack(means) * share).sum(0)
    return mean, ((torch.stack(squares) * share).sum(0) - mean.square()).clamp(min=0)


def _gain(wanted: Tensor, variance: Tensor) -> Tensor:
    """The factor of every channel; 1 if its variance is zero."""
    usable = (wanted > _LEAST_VARIANCE * wanted.mean()) & (variance > _LEAST_VARIANCE * variance.mean())
    gain = torch.where(usable, wanted / torch.where(usable, variance, 1.0), 1.0).sqrt()
    return gain.clamp(1 / _LARGEST_GAIN, _LARGEST_GAIN)


def has_row_scales(layer: Quantized) -> bool:
    """Whether every output channel has scales of its own, of a type fine enough for small gains."""
    spec = layer.weight_specs["weight"]
    return spec.granularity != "tensor" and spec.scale in ("fp32", "bf16")


def stretch_(layer: Quantized, gain: Tensor) -> Tensor:
    """Multiplies the scales of every output channel, in place.

    Args:
        layer: A layer for which :func:`has_row_scales` is true.
        gain: float64 of shape (rows,).

    Returns:
        The gains that the scales' rounding made of them: float64 of shape (rows,).
    """
    old = layer.get_buffer("weight_scale")
    new = (old.double() * gain[:, None]).to(old.dtype)
    layer.register_buffer("weight_scale", new)
    return (new.double() / old.double()).mean(1)
