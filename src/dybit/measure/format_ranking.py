"""Ranks formats by how well they fit weights: error and bits of each, and the best single table as a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats import lloyd_max
from dybit.formats.codebook import Codebook, Family, Table
from dybit.formats.scaling import SCALE_BITS, ScaleType
from dybit.kernels.lookup import lookup
from dybit.tensors.scale_search import Scales, choose_scales

_BOUND_WEIGHTS = 1 << 21  # weights to which the bound is fitted
_BOUND_ROUNDS = 10


@dataclass(frozen=True)
class Setting:
    """The settings that all formats of a comparison share, unless a format prescribes its own.

    Attributes:
        granularity: ``tensor``, ``channel`` or ``group``.
        group_size: Weights in a group, or None.
        scale: Type of the scales.
        method: How scales are chosen.
    """

    granularity: Literal["tensor", "channel", "group"]
    group_size: int | None
    scale: ScaleType
    method: Literal["mse", "absmax", "percentile"]

    def of(self, family: Family) -> Setting:
        """Returns the setting for a format, including what the format prescribes."""
        size = family.group_size or self.group_size
        granularity = "group" if family.group_size else self.granularity
        return Setting(granularity, size, family.scale or self.scale, self.method)


@dataclass(frozen=True)
class Result:
    """The figures of a format.

    Attributes:
        family: The format.
        sqnr: Pooled over all weights, dB.
        scale_bits: Bits of scales, per weight.
        choice_bits: Bits of choices among codebooks, per weight.
        most_used: The codebook that most units chose.
        share: The share of units that chose it.
        unit: Its typical scale, in root mean squares of the unit; negative if most scales are.
        setting: The setting of the measurement.
        kind: ``dybit``, ``rival`` or ``bound``.
    """

    family: Family
    sqnr: float
    scale_bits: float
    choice_bits: float
    most_used: Codebook
    share: float
    unit: float
    setting: Setting
    kind: str

    @property
    def bits(self) -> float:
        """Bits per weight, including scales and choices."""
        return self.family.bits + self.scale_bits + self.choice_bits


def measure(
    matrices: Sequence[Tensor],
    families: Sequence[Family],
    setting: Setting,
    bits: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Result]:
    """Measures formats and the Lloyd-Max bound of a width, best first.

    Args:
        matrices: Weights of shape (rows, columns), rows being output channels.
        families: The formats.
        setting: What they share.
        bits: Width of the bound.
        progress: Called with (weights done, all, name of the format).
    """
    results = []
    total = (len(families) + 1) * sum(matrix.numel() for matrix in matrices)
    done = 0

    def step(count: int, text: str) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total, text)

    for family in families:
        name = family.name
        ours = "dybit" if "dybit" in name or (name[:1] in "su" and name[1:2].isdigit()) else "rival"
        results.append(_measure(matrices, family, setting, ours, step))
    step(0, "Lloyd-Max")
    singles = [r for r in results if len(r.family.books) == 1 and r.family.group_size is None and r.family.bits == bits]
    start = max(singles, key=lambda result: result.sqnr).most_used if singles else None
    bound = _lloyd(matrices, setting, bits, start)
    if bound is not None:
        results.append(_measure(matrices, bound, setting, "bound", step))
    return sorted(results, key=lambda result: -result.sqnr)


def _scales(matrix: Tensor, family: Family, setting: Setting) -> Scales:
    return choose_scales(
        matrix,
        family,
        granularity=setting.granularity,
        group_size=setting.group_size,
        scale_type=setting.scale,
        method=setting.method,
    )


def _measure(
    matrices: Sequence[Tensor], family: Family, setting: Setting, kind: str, step: Callable[[int, str], None]
) -> Result:
    own = setting.of(family)
    signal = noise = 0.0
    scales_count = weights_count = tensors_bits = 0
    votes = torch.zeros(len(family.books), dtype=torch.int64, device="cpu")
    ratios: list[Tensor] = []
    owners: list[Tensor] = []
    for matrix in matrices:
        step(0, family.name)
        found = _scales(matrix, family, own)
        signal += float(matrix.double().square().sum())
        noise += found.error
        scales_count += found.scale.numel()
        weights_count += matrix.numel()
        tensors_bits += 32 if own.scale == "e4m3" else 0
        choice = torch.zeros_like(found.scale, dtype=torch.int64) if found.choice is None else found.choice.long()
        votes += torch.bincount(choice.flatten(), minlength=len(votes))
        ratios.append((found.scale / _unit_rms(matrix, own)).flatten())
        owners.append(choice.flatten())
        step(matrix.numel(), family.name)
    best = int(votes.argmax())
    units = torch.cat(ratios)[torch.cat(owners) == best]
    sign = -1.0 if float((units < 0).double().mean()) > 0.5 else 1.0
    return Result(
        family=family,
        sqnr=10 * math.log10(signal / noise) if noise and signal else math.inf,
        scale_bits=(scales_count * SCALE_BITS[own.scale] + tensors_bits) / weights_count,
        choice_bits=scales_count * family.choice_bits / weights_count,
        most_used=family.books[best],
        share=float(votes[best]) / scales_count,
        unit=sign * float(units.abs().median()),
        setting=own,
        kind=kind,
    )


def _unit_rms(matrix: Tensor, setting: Setting) -> Tensor:
    """Returns the root mean square of every unit that shares a scale: (1, 1), (rows, 1) or (rows, groups); not zero."""
    square = matrix.float().square()
    if setting.granularity == "tensor":
        mean = square.mean().view(1, 1)
    elif setting.granularity == "channel":
        mean = square.mean(1, keepdim=True)
    else:
        parts = square.split(setting.group_size or square.shape[1], dim=1)
        mean = torch.stack([part.mean(1) for part in parts], dim=1)
    return torch.where(mean > 0, mean, 1.0).sqrt()


def _spread(unit: Tensor, matrix: Tensor, setting: Setting) -> Tensor:
    """Expands a number per unit so that it broadcasts against the matrix."""
    if setting.granularity != "group":
        return unit
    return unit.repeat_interleave(setting.group_size or matrix.shape[1], dim=1)[:, : matrix.shape[1]]


def normalized(matrices: Sequence[Tensor], setting: Setting, limit: int) -> NDArray[np.float64]:
    """About ``limit`` weights, evenly drawn, each divided by the root mean square of its unit: float64 (samples,)."""
    total = sum(matrix.numel() for matrix in matrices)
    samples = []
    for matrix in matrices:
        ratio = matrix / _spread(_unit_rms(matrix, setting), matrix, setting)
        wanted = max(1, round(limit * matrix.numel() / total))
        index = torch.linspace(
            0, matrix.numel() - 1, min(wanted, matrix.numel()), dtype=torch.float64, device="cpu"
        ).long()
        samples.append(ratio.reshape(-1)[index].double())
    return torch.cat(samples).numpy()


def _lloyd(matrices: Sequence[Tensor], setting: Setting, bits: int, start: Codebook | None) -> Family | None:
    """Returns the best single table for these weights, as a format; None if they have too few values.

    Table and scales depend on each other, so they are fitted alternately (Lloyd's algorithm, with the error of a unit
    weighted by its squared scale). No step increases the error. It starts at the best known table.

    Args:
        matrices: The weights.
        setting: Granularity and scales.
        bits: Width of the table.
        start: The best single table of the comparison, if any.
    """
    share = min(1.0, _BOUND_WEIGHTS / sum(matrix.numel() for matrix in matrices))
    fitted = [_sampled_rows(matrix, share) for matrix in matrices]
    best: tuple[float, Family] | None = None
    try:
        fresh = lloyd_max.lloyd_max(normalized([matrix for matrix, _ in fitted], setting, _BOUND_WEIGHTS), bits)
    except DyBitError:
        return None
    for book in (fresh, start):
        for _ in range(_BOUND_ROUNDS if book is not None else 0):
            assert book is not None
            family = Family(f"lloyd{bits}", (book,))
            error, updated = _lloyd_turn(fitted, family, setting)
            if best is None or error < best[0]:
                best = error, family
            if updated is None:
                break
            book = updated
    return best and best[1]


def _sampled_rows(matrix: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Samples rows, and returns how many rows each represents, (rows, 1).

    Half of the sample are the rows with the largest norms, since few rows with outliers may have most of the error. The
    others are evenly spaced among the rest.
    """
    order = matrix.norm(dim=1).argsort(descending=True)
    sure = min(len(order), math.ceil(len(order) * share / 2))
    every = max(1, round((len(order) - sure) / max(1, len(order) * share / 2)))
    rest = order[sure + every // 2 :: every]
    counts = torch.ones(sure + len(rest), 1, dtype=torch.float32, device=matrix.device)
    counts[sure:] = (len(order) - sure) / max(1, len(rest))
    return matrix[torch.cat([order[:sure], rest])], counts


def _lloyd_turn(
    matrices: Sequence[tuple[Tensor, Tensor]], family: Family, setting: Setting
) -> tuple[float, Codebook | None]:
    """Returns the error of a table at its best scales, and the best table for the codes at these scales.

    The table is None if two of its levels would be equal.
    """
    table = lookup(family.books[0], torch.device("cpu"))
    count = len(table.levels)
    error = 0.0
    products, squares = torch.zeros(2, count, dtype=torch.float64, device="cpu")
    for matrix, counts in matrices:
        found = _scales(matrix, family, setting)
        scale = _spread(found.scale, matrix, setting)
        level = table.nearest(matrix / scale)
        value = table.levels[level.long()]
        error += float(((matrix - value * scale).square() * counts).sum(dtype=torch.float64))
        level = level.flatten().long()
        products += torch.bincount(level, (matrix * scale * counts).flatten().double(), count)
        squares += torch.bincount(level, (scale.square() * counts).expand(matrix.shape).flatten().double(), count)
    levels = torch.where(squares > 0, products / squares, table.levels.double())
    values = np.full(1 << family.bits, np.nan)
    values[:count] = levels.sort().values.numpy()
    return error, Table("lloyd", values) if len(np.unique(values[:count])) == count else None
