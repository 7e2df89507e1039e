"""Observes the inputs of layers on calibration batches, and chooses their formats and scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.formats.codebook import Codebook, Family
from dybit.formats.scaling import Method
from dybit.layers.input_spec import InputSpec
from dybit.models.running import evaluating, iterate, observing, positions, run_batch
from dybit.tensors.scale_search import choose_reach, choose_scales

_SAMPLES_PER_BATCH = 1 << 15
_LEAST_POSITIONS = 16
_OFFSET_GAIN = 0.8
_LARGEST = torch.finfo(torch.float32).max
_MAX_SAMPLES = 1 << 18
_MAX_REACH_ELEMENTS = 1 << 15  # fewer than for static scales: the reach is searched exhaustively
_SEED = 0x0DB17


@dataclass
class InputStatistics:
    """Statistics of the inputs of one layer: one input, or query, key and value of attention.

    Attributes:
        square_sums: Sum of squares of every channel, for every input: float64 of shape (channels,).
        counts: Observed positions (tokens, pixels) of every input.
        low: The smallest element of all.
        high: The largest element of all.
        samples: Random positions, each float32 of shape (positions, channels), about 2^18 elements in total.
    """

    square_sums: dict[int, Tensor] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)
    low: float = float("inf")
    high: float = float("-inf")
    samples: list[Tensor] = field(default_factory=list)

    @property
    def seen(self) -> bool:
        """Whether any input was observed."""
        return bool(self.square_sums)

    def second_moment(self, index: int = 0) -> Tensor:
        """Returns the mean square of every channel of an input: float32 of shape (channels,)."""
        index = index if index in self.square_sums else 0  # self-attention of a subclass with one argument
        return (self.square_sums[index] / self.counts[index]).float()

    def add(self, index: int, flat: Tensor) -> None:
        """Adds positions of an input: float32 of shape (positions, channels)."""
        square = flat.square().sum(0, dtype=torch.float64)
        self.square_sums[index] = self.square_sums[index] + square if index in self.square_sums else square
        self.counts[index] += flat.shape[0]
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))

    def draw(self, flat: Tensor, generator: torch.Generator) -> None:
        """Keeps some of the positions until the sample is full."""
        if sum(part.numel() for part in self.samples) < _MAX_SAMPLES:
            wanted = max(_LEAST_POSITIONS, _SAMPLES_PER_BATCH // flat.shape[1])
            if flat.shape[0] > wanted:
                flat = flat[
                    torch.randint(flat.shape[0], (wanted,), generator=generator, dtype=torch.int64, device="cpu").to(
                        flat.device
                    )
                ]
            self.samples.append(flat.cpu())

    def elements(self) -> Tensor:
        """Returns all sampled elements: float32 of shape (n,)."""
        return torch.cat([part.flatten() for part in self.samples])

    def positions(self) -> Tensor:
        """Returns the sampled positions of the first input: float32 of shape (positions, channels)."""
        return torch.cat([part for part in self.samples if part.shape[1] == self.samples[0].shape[1]])


def calibrate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    sample: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, InputStatistics]:
    """Runs a model on calibration batches and observes the inputs of some layers.

    Args:
        model: The model. It runs without gradients in evaluation mode; its mode is restored.
        layers: The layers to observe, by name.
        batches: Each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        sample: Whether to draw samples, which static scales need.
        progress: Called with a line of text after every batch.

    Returns:
        The statistics of every layer; empty for layers that were never called.

    Raises:
        DyBitError: There is no batch, a batch does not fit the model (chained to the model's error), or the inputs of a
            layer hold NaN or infinity.
    """
    statistics = {name: InputStatistics() for name in layers}
    generator = torch.Generator().manual_seed(_SEED)
    count = 0

    def observe(name: str, module: nn.Module, inputs: list[Tensor]) -> None:
        for index, x in enumerate(inputs):
            if not x.numel():
                continue
            flat = positions(name, module, x)
            statistics[name].add(index, flat)
            if sample and all(x is not other for other in inputs[:index]):
                statistics[name].draw(flat, generator)

    with evaluating(model), observing(layers, observe):
        for count, batch in enumerate(iterate(batches), start=1):
            run_batch(model, batch, f"calibration batch {count - 1}")
            if progress:
                progress(f"calibrating: batch {count}")
    if count == 0:
        raise DyBitError("calibration yields no batch")
    return statistics


def choose_input(
    statistics: InputStatistics,
    families: tuple[Family, Family | None],
    *,
    method: Method = "mse",
    percentile: float = 99.99,
    offset: bool = True,
) -> tuple[InputSpec, Tensor, Tensor | None]:
    """Chooses format, scale and offset of a static input.

    Args:
        statistics: Of the layer's inputs.
        families: The formats for signed inputs, and for inputs that are never negative (or None).
        method: ``mse`` over the samples, ``absmax`` (min-max) or ``percentile``.
        percentile: For ``method="percentile"``.
        offset: Whether signed inputs may use an unsigned format and an offset, if that lowers the squared error by at
            least 20 %.

    Returns:
        The spec, the scale (float32 of shape (1,)) and the offset (float32 of shape (1,), or None).
    """
    signed, unsigned = families
    sample = statistics.elements()
    if method != "mse":  # add the extremes, which the sample may have missed
        sample = torch.cat([sample, sample.new_tensor([statistics.low, statistics.high])])
    candidates: list[tuple[Family, float]] = []
    if unsigned is not None and statistics.low >= 0:
        candidates.append((unsigned, 0.0))
    else:
        candidates.append((signed, 0.0))
        if unsigned is not None and offset and statistics.high - statistics.low <= _LARGEST:
            candidates.append((unsigned, statistics.low))
    best: tuple[float, InputSpec, Tensor, Tensor | None] | None = None
    for family, low in candidates:
        scales = choose_scales((sample - low)[None], family, granularity="tensor", method=method, percentile=percentile)
        # An offset costs an addition at every use of the codes, so it must reduce the error noticeably.
        error = scales.error / (_OFFSET_GAIN if low else 1.0)
        if best is None or error < best[0]:
            book = family.books[int(scales.choice.item()) if scales.choice is not None else 0]
            spec = InputSpec(book.name, offset=low != 0)
            scale = scales.scale.reshape(1)
            shift = sample.new_tensor([low]) if low != 0 else None
            if shift is not None and low < 0 < statistics.high and len(book.levels) >= _MANY_LEVELS:
                shift = _with_zero(shift, scale, book)
            best = error, spec, scale, shift
    assert best is not None
    return best[1:]


_MANY_LEVELS = 128  # of which half a step matters little


def _with_zero(low: Tensor, scale: Tensor, book: Codebook) -> Tensor:
    """Returns the offset next to the lowest number that makes 0 the value of a code, if its range reaches to 0."""
    levels = scale.new_tensor(book.levels)
    zero = (levels + low / scale).abs().argmin()
    return -levels[zero] * scale if zero < len(levels) - 1 else low


def choose_dynamic_input(
    statistics: InputStatistics | None, family: Family, group_size: int | None = None
) -> InputSpec:
    """Chooses format and reach of a dynamic input by the least error on the sampled positions.

    Without calibration it takes the member with ``max_run = 2``, if there is one, up to its largest value. On inputs of
    transformers this is close to the best choice; an integer format loses several dB (docs/accuracy.md).

    Args:
        statistics: Of the layer's inputs, or None without calibration.
        family: The formats to choose from.
        group_size: Features that share a scale, or None for all features of a position.
    """
    if statistics is None or not statistics.samples:
        book = family.books[min(1, len(family.books) - 1)]
        reach = float(np.abs(book.levels).max())
    else:
        rows = statistics.positions()
        if group_size:
            rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group_size)).reshape(-1, group_size)
        book, reach = choose_reach(rows[: max(1, _MAX_REACH_ELEMENTS // rows.shape[1])], family)
    return InputSpec(book.name, "dynamic", reach, group_size)
