"""AdaRound: rounds every weight up or down so that the outputs of its layer come closest to the reference's.

Layers are rounded in order of execution, each for the inputs that it will have, which come through the rounded layers
before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.quantized import Quantized
from dybit.layers.swap import set_bias_
from dybit.models.running import Progress
from dybit.ptq.corrections.lockstep import Call, correctable, walk
from dybit.ptq.corrections.moments import Moments, measure
from dybit.ptq.corrections.nearest_two import Candidates, descend
from dybit.ptq.corrections.statistics import has_row_scales, stretch_
from dybit.tensors.encoding import encode_matrix, unit_rows
from dybit.tensors.scale_search import Scales

_SWEEPS = 20
_ROUNDS = 3  # of rounding and of fitting gains
_DAMPING = 1.0  # chosen on held-out calibration pictures; for as many positions as columns twice as much
_FLOOR = 1e-4  # damping of inputs that are nearly always zero, as a share of the mean
_LARGEST_GAIN = 2.0
_SEED = 0x0DB17


def adaround_(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None
) -> nn.Module:
    """Chooses between the two neighbouring codes of every weight by the error of its layer's outputs.

    The gains of output channels with FP32 or BF16 scales of their own are fitted along, and so are biases, which layers
    without one are given. Everything follows from second moments of sampled inputs (``moments``).

    Args:
        model: A quantized model, changed in place.
        reference: The same model in floating point, batch norms folded as in ``model``.
        batches: Calibration batches, each a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        progress: Called with (done, total, text) before every layer and after the last.

    Returns:
        The same model.

    Raises:
        DyBitError: There is no batch, one does not fit, inputs are not finite, or the models do not match.
    """
    layers = correctable(model, reference)
    generator = torch.Generator().manual_seed(_SEED)

    def visit(name: str, calls: list[Call], originals: list[Call]) -> None:
        round_layer_(name, layers[name], reference.get_submodule(name), calls, originals, generator)

    walk(model, reference, layers, batches, visit, progress)
    return model


def round_layer_(
    name: str,
    layer: Quantized,
    original: nn.Module,
    calls: list[Call],
    originals: list[Call],
    generator: torch.Generator,
) -> None:
    """Rounds one layer for its calls in the model, to the outputs of the original for its calls in the reference."""
    try:
        moments = measure(layer, original, calls, originals, generator)
    except DyBitError as error:
        raise DyBitError(f"layer {name!r}: {error}") from None
    if moments is None:
        warnings.warn(
            f"layer {name!r} stays as it is: its forward is not a product with its weight", DyBitWarning, stacklevel=2
        )
        return
    weight = layer.quantized_tensor()
    matrix = weight.spec.to_matrix(original.get_parameter("weight").detach().float())
    candidates = Candidates.of(matrix, weight)
    gain = _fit(candidates, matrix, moments, stretching=has_row_scales(layer))
    if has_row_scales(layer):
        gain = stretch_(layer, gain)
    store_(layer, candidates.now)
    value = (candidates.now * candidates.scale).double() * gain[:, None]
    bias = moments.wanted - (value.view(moments.cross.shape) * moments.mean[:, None]).sum(2)
    set_bias_(layer, bias.flatten())


def _fit(candidates: Candidates, matrix: Tensor, moments: Moments, *, stretching: bool) -> Tensor:
    """Flips candidates, in place; returns the gains of the rows, float64."""
    shape = moments.cross.shape
    second, cross = _damped(moments, matrix.view(shape))
    scale = candidates.scale.reshape(shape)
    gain = scale.new_ones(*shape[:2], 1)
    for _ in range(_ROUNDS if stretching else 1):
        now, other = (x.view(shape) * scale * gain for x in (candidates.now, candidates.other))
        gradient = now @ second - cross
        flipped = descend(other - now, second, gradient, _SWEEPS)
        candidates.flip(flipped.view(matrix.shape))
        if stretching:
            now = torch.where(flipped, other, now)
            energy = (now * (gradient + cross)).sum(2, keepdim=True)
            best = (now * cross).sum(2, keepdim=True) / torch.where(energy > 0, energy, 1.0)
            gain = torch.where(energy > 0, gain * best, gain).clamp(1 / _LARGEST_GAIN, _LARGEST_GAIN)
    return gain.flatten().double()


def _damped(moments: Moments, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The moments with a pull of every weight to its original value, the stronger the fewer positions were seen."""
    diagonal = moments.second.diagonal(dim1=1, dim2=2)
    share = _DAMPING * (1 + diagonal.shape[1] / moments.count)
    extra = share * diagonal + _FLOOR * diagonal.mean(1, keepdim=True)
    return moments.second + torch.diag_embed(extra), moments.cross + matrix * extra[:, None]


def store_(layer: Quantized, levels: Tensor) -> None:
    """Gives a layer other codes at its scales.

    Args:
        layer: The layer, changed in place.
        levels: Levels of its codebooks: float32 of shape (rows, columns).
    """
    weight = layer.quantized_tensor()
    shared = 1.0 if weight.tensor_scale is None else float(weight.tensor_scale)
    scales = Scales(weight.scales(), weight.choices(), shared, 0.0)
    scale = unit_rows(scales.scale, weight.spec)
    layer.register_buffer("weight", encode_matrix(levels * scale, weight.spec, scales).packed)
