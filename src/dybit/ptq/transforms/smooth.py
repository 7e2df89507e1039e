"""Smoothing: moves the scale of input channels into the layers before, as far as that helps the quantized output.

G. Xiao et al., "SmoothQuant", 2023, and J. Lin et al., "AWQ: Activation-aware weight quantization", 2024.
Every factor is tried on layers quantized by their recipes.

Dividing an input channel by a factor and multiplying its weights by the same changes nothing but the errors: a large
factor protects the weights of important channels, and takes outliers out of the input. For every producer of channels
some curves of factors are tried, and the one is kept that has the smallest error of the outputs of the layers that read
them, on calibration inputs. No factors at all is one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dybit.layers.kinds import channel_dim
from dybit.models.calibration import InputStatistics, calibrate
from dybit.models.plan import Plan, Ties
from dybit.models.running import Progress, evaluating, run_batch, without_fast_path
from dybit.ptq.rounding.nearest import quantize_layer
from dybit.ptq.transforms.factors import by_input, input_range, inputs_first, move_limit_, scale_
from dybit.ptq.transforms.links import Link, find_links
from dybit.ptq.transforms.preserve import preserving
from dybit.recipe import LayerRecipe

# Exponents of the inputs' root mean square (AWQ), and of their largest magnitude against that of the weights
# (SmoothQuant).
_AWQ = (0.15, 0.3, 0.45, 0.6, 0.8)
_SMOOTHQUANT = (0.35, 0.5, 0.65)
_POSITIONS = 256  # inputs on which outputs are compared
_ROWS = 64  # outputs of a linear layer that are compared
_SAMPLED = 1 << 14  # elements of the input from which its scale is chosen
_LEAST_SAMPLES = 8  # positions
_IMAGES = 2  # inputs of a convolution
_RANGE = 1e3  # between the largest and the smallest factor, at most


def smooth_(
    model: nn.Module,
    recipes: Mapping[str, LayerRecipe],
    batches: Sequence[Any],
    *,
    progress: Progress | None = None,
) -> None:
    """Moves factors between layers where that lowers the error of their quantized outputs, in place.

    The floating-point model computes what it did. Which layers feed which is found by running it
    (:mod:`dybit.ptq.transforms.links`): norms before linear layers, value and output projections, gated products,
    convolutions; what is not understood is left alone.

    Args:
        model: A floating-point model, its batch norms folded.
        recipes: How the layers will be quantized, by name.
        batches: Calibration batches.
        progress: Called with (done, total, text).

    Raises:
        DyBitError: A batch does not fit the model.
    """
    links = [link for link in find_links(model, batches[0]) if _suits(link, recipes)]
    if not links:
        return
    readers = {name: model.get_submodule(name) for link in links for name in link.readers if name in recipes}
    report = (lambda text: progress(0, len(links), text)) if progress else None
    statistics = calibrate(model, readers, batches, progress=report)
    images = _images(model, {name: m for name, m in readers.items() if not _by_position(m)}, batches[0])
    changed = {name for link in links for name in (link.producer, *link.readers)}
    with preserving(model, changed, batches[0], "smooth"):
        for done, link in enumerate(links):
            if progress:
                progress(done, len(links), link.producer)
            judge = _Judge(model, link, recipes, statistics, images)
            factor = judge.best()
            if factor is not None:
                scale_(model, link, factor)
                move_limit_(model, link, factor)


def _suits(link: Link, recipes: Mapping[str, LayerRecipe]) -> bool:
    """Whether a link has a quantized reader, and a producer to whose own errors factors make no difference."""
    producer = recipes.get(link.producer)
    if producer is not None and producer.weights is not None:
        absorbs = producer.scale_granularity != "tensor" and producer.scale_type in ("fp32", "bf16")
        if not absorbs:
            return False
    return any(name in recipes for name in link.readers)


def _by_position(module: nn.Module) -> bool:
    """Whether a layer treats every position of its input by itself: linear layers."""
    return not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _images(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """The inputs of convolutions on some items of a batch."""
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.setdefault(name, args[0][:_IMAGES].detach().clone())

        return keep

    handles = [module.register_forward_pre_hook(keeper(name)) for name, module in layers.items()]
    try:
        if layers:
            with evaluating(model), without_fast_path():
                run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return kept


class _Judge:
    """Tries factors for the channels of one producer."""

    def __init__(
        self,
        model: nn.Module,
        link: Link,
        recipes: Mapping[str, LayerRecipe],
        statistics: Mapping[str, InputStatistics],
        images: Mapping[str, Tensor],
    ) -> None:
        self.link = link
        self.weights = input_range(model, link)
        self.power = torch.zeros_like(self.weights)
        self.largest = torch.zeros_like(self.weights)
        self.trials: list[_Trial] = []
        for name, index in link.readers.items():
            seen = statistics.get(name)
            if seen is None or not seen.seen:
                continue
            used = index >= 0
            largest = seen.positions().abs().amax(0).to(self.power)
            self.power.scatter_reduce_(0, index[used], seen.second_moment()[used], "amax")
            self.largest.scatter_reduce_(0, index[used], largest[used], "amax")
            trial = _Trial(model.get_submodule(name), recipes[name], seen, index, images.get(name))
            if not any(other.join(trial) for other in self.trials):
                self.trials.append(trial)

    def best(self) -> Tensor | None:
        """The factors with the smallest error: of shape (channels,); None where no factors are best."""
        if not self.trials or not bool((self.power > 0).any()):
            return None
        best, least = None, self._error(None)
        rms, weights = _positive(self.power.sqrt()), _positive(self.weights)
        curves = [rms**a for a in _AWQ] + [_positive(self.largest) ** a / weights ** (1 - a) for a in _SMOOTHQUANT]
        for curve in curves:
            factor = _bounded(curve)
            error = self._error(factor)
            if error < least:
                best, least = factor, error
        return best

    def _error(self, factor: Tensor | None) -> float:
        return sum(trial.error(factor) for trial in self.trials)


class _Trial:
    """A reader of channels, or several alike: how far quantized outputs are from their own with given factors."""

    def __init__(
        self, module: nn.Module, recipe: LayerRecipe, seen: InputStatistics, index: Tensor, images: Tensor | None
    ) -> None:
        rows = seen.positions()
        self.recipe, self.index = recipe, index
        self.whole = type(module) is not nn.Linear or recipe.scale_granularity == "tensor"
        self.layer = copy.deepcopy(module) if self.whole else _linear(_spaced(cast(Tensor, module.weight)))
        self.seen = replace(seen, samples=[rows[: max(_LEAST_SAMPLES, _SAMPLED // rows.shape[1])]])
        self.inputs = (rows[:_POSITIONS] if images is None else images).to(cast(Tensor, self.layer.weight))
        self.parts = [self.layer(self.inputs).detach()]
        self.energies = [_energy(self.parts[0])]

    def join(self, other: _Trial) -> bool:
        """Takes another reader of the same input into this one, so that inputs are rounded once; whether it could."""
        if self.whole or other.whole or self.recipe != other.recipe or not torch.equal(self.index, other.index):
            return False
        self.layer = _linear(torch.cat([cast(Tensor, self.layer.weight), cast(Tensor, other.layer.weight)]))
        self.parts += other.parts
        self.energies += other.energies
        return True

    @torch.no_grad()
    def error(self, factor: Tensor | None) -> float:
        """The squared error of the quantized outputs over the energy of the others, summed over readers."""
        layer, seen, x = copy.deepcopy(self.layer), self.seen, self.inputs
        if factor is not None:
            factor = by_input(factor, self.index)
            columns = inputs_first(layer)
            columns.mul_(factor.view(*columns.shape[:2], *(1,) * (columns.ndim - 2)).to(columns.dtype))
            x = x / factor.view(-1, *(1,) * (x.ndim - 1 - channel_dim(layer, x))).to(x.dtype)
            seen = _divided(seen, factor)
        quantize_layer(Plan("", layer, self.recipe), seen, Ties([]))
        sizes = [1] if self.whole else [part.shape[-1] for part in self.parts]
        outputs = [layer(x)] if self.whole else layer(x).split(sizes, -1)
        pairs = zip(outputs, self.parts, self.energies, strict=True)
        return sum(float((y.double() - part.double()).square().sum()) / energy for y, part, energy in pairs if energy)


def _energy(output: Tensor) -> float:
    """The squares of what is not a mere constant, which a bias could be."""
    return float(output.double().var(correction=0)) * output.numel()


def _spaced(weight: Tensor) -> Tensor:
    """Evenly spaced outputs of a linear layer: enough to compare factors by."""
    return weight.detach()[:: max(1, weight.shape[0] // _ROWS)][:_ROWS].clone()


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _divided(seen: InputStatistics, factor: Tensor) -> InputStatistics:
    """The statistics of inputs divided by factors."""
    sums = {0: seen.square_sums[0] / factor.to(seen.square_sums[0]).square()}
    samples = [part / factor.cpu() for part in seen.samples]
    low = min(float(part.min()) for part in samples)
    high = max(float(part.max()) for part in samples)
    return InputStatistics(sums, seen.counts, low if seen.low < 0 else max(low, 0.0), high, samples)


def _positive(x: Tensor) -> Tensor:
    """Channels that were never used, or hardly, count as the least used of the others."""
    return x.clamp(min=float(x.max()) / _RANGE)


def _bounded(curve: Tensor) -> Tensor:
    """Factors about one, of a limited range."""
    factor = curve / (curve.max() * curve.min()).sqrt()
    return factor.clamp(_RANGE**-0.5, _RANGE**0.5)
