"""Chooses the scale and the codebook of every tensor, channel or group of a weight.

The search for the least error has two steps. The coarse step (:mod:`dybit.tensors.coarse_search`) tries many scales of
every codebook at once. Then one least-squares step refines the best scale of every codebook, and the exact error
decides between the two. The steps for one codebook do not depend on the others, so a choice among several codebooks
never has a larger error than any one of them. E4M3 scales are the exception: they share a factor that depends on all
codebooks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats.codebook import Codebook, Family
from dybit.formats.scaling import GRANULARITIES, METHODS, Granularity, Method, ScaleType
from dybit.kernels.packed_codes import spans
from dybit.kernels.scale_errors import Chunks, fit
from dybit.tensors.coarse_search import coarse_starts, reaches, scale_has_sign
from dybit.tensors.scale_types import TINIEST, e4m3_factor, largest_scale, normal_numbers, scale_candidates

_TOP_ROWS = 16  # rows that determine how large E4M3 scales must be
_FARTHEST = 2.0**60  # beyond this ratio of scale to unit, all codes are zero anyway
_BLOCK = 1 << 19  # elements processed at once, so that temporaries stay in the cache


@dataclass(frozen=True)
class Scales:
    """The outcome of a search.

    Attributes:
        scale: float32 of shape (rows, groups), (rows, 1) or (1, 1), depending on the granularity. Never zero; negative
            only for codebooks that are not symmetric.
        choice: Index of the codebook of every unit, uint8 of the shape of ``scale``; None for a family of one.
        tensor_scale: The factor that E4M3 scales share; 1.0 for other types.
        error: The squared error over all elements, weighted by the importance if there is one.
    """

    scale: Tensor
    choice: Tensor | None
    tensor_scale: float
    error: float


def choose_scales(
    matrix: Tensor,
    family: Family,
    *,
    granularity: Granularity = "channel",
    group_size: int | None = None,
    scale_type: ScaleType = "fp32",
    choice_granularity: Granularity | None = None,
    method: Method = "mse",
    percentile: float = 99.99,
    importance: Tensor | None = None,
    incumbent: Tensor | None = None,
    hysteresis: float = 0.0,
) -> Scales:
    """Chooses scales and codebooks for a matrix.

    Args:
        matrix: Finite floating point of shape (rows, columns); rows are output channels.
        family: The codebooks to choose from.
        granularity: What shares a scale: the tensor, a channel (row), or ``group_size`` columns of a row. The last
            group of a row can be shorter.
        group_size: Only for ``granularity="group"``.
        scale_type: ``fp32``, ``bf16``, ``pow2`` (a power of two from 2^-64 to 2^63) or ``e4m3`` (FP8 times one FP32
            factor for the tensor, as in NVFP4).
        choice_granularity: What shares a codebook; None for the same as ``granularity``. Not finer than it.
        method: ``mse`` (least squared error), ``absmax`` (nothing is clipped) or ``percentile`` (of the magnitudes).
        percentile: For ``method="percentile"``, above 0 and up to 100.
        importance: Weight of every squared error, of shape (columns,) or (rows, columns), at least 0. The second
            moments of the layer's inputs turn the error of the weight into the error of the output. None for equal
            weights.
        incumbent: The current codebooks, of the shape of ``Scales.choice``, or None.
        hysteresis: The relative reduction of the error that a codebook must bring to replace the incumbent.

    Returns:
        The scales, with the codebook of every unit. An all-zero unit gets scale 1, or the smallest one if its
        codebook has no zero.

    Raises:
        DyBitError: An argument is out of range or does not fit the others.
    """
    choice_granularity = choice_granularity or granularity
    _check(matrix, granularity, group_size, choice_granularity, method, percentile)
    importance = None if importance is None else _normalized(importance, *matrix.shape)
    tensor_scale = 1.0
    if scale_type == "e4m3":
        tensor_scale = _e4m3_factor(matrix, family.books)
        if method == "mse":
            largest = _largest_wanted(matrix, family, importance, granularity, group_size, choice_granularity)
            ratio = largest / largest_scale("e4m3", tensor_scale)
            tensor_scale *= 2.0 ** math.ceil(math.log2(max(1.0, ratio)))  # a power of two keeps all bits
    search = _Search(family, scale_type, tensor_scale, method, percentile)
    if granularity == "tensor":
        chunks = [(block.float(), weights) for block, weights in _row_blocks(matrix, importance)]
        error, scale = search.run(chunks, pooled=True)
        error, scale = error[None], scale[None]
    else:
        length = group_size if granularity == "group" else None
        decide = choice_granularity == granularity and incumbent is None
        error, scale = _by_units(matrix, importance, length, search, decide)
    return _pick(error, scale, family, choice_granularity, tensor_scale, incumbent, hysteresis)


def _by_units(
    matrix: Tensor, importance: Tensor | None, group_size: int | None, search: _Search, decide: bool
) -> tuple[Tensor, Tensor]:
    """Searches unit by unit: (error, scale) of shape (rows, groups, books).

    With ``decide``, every unit takes its best codebook at once, and ``error[..., 1]`` is its index. Keeping the
    scales of all codebooks would take more memory than the tensor if groups are small.
    """
    errors, scales = [], []
    for start, groups, length in spans(matrix.shape[1], group_size):
        stop = start + groups * length
        weights = None if importance is None else importance[:, start:stop]
        parts = []
        for block, block_weights in _row_blocks(matrix[:, start:stop], weights):
            flat = block.float().reshape(-1, length)
            h = None if block_weights is None else block_weights.expand(block.shape).reshape(-1, length)
            error, scale = search.run([(flat, h)], pooled=False)
            if decide:
                best = error.argmin(-1, keepdim=True)
                error = torch.cat([error.gather(-1, best), best.to(error.dtype)], dim=-1)
                scale = scale.gather(-1, best)
            parts.append((error.unflatten(0, (-1, groups)), scale.unflatten(0, (-1, groups))))
        errors.append(torch.cat([error for error, _ in parts]))
        scales.append(torch.cat([scale for _, scale in parts]))
    return torch.cat(errors, dim=1), torch.cat(scales, dim=1)


def _pick(
    error: Tensor,
    scale: Tensor,
    family: Family,
    choice: Granularity,
    tensor_scale: float,
    incumbent: Tensor | None,
    hysteresis: float,
) -> Scales:
    """Picks the codebook of every unit, channel or tensor from errors of shape (rows, groups, books)."""
    if scale.shape[-1] == 1 and error.shape[-1] == 2:  # already decided unit by unit
        books = error[..., 1].to(torch.uint8)
        chosen, total = scale[..., 0], error[..., 0].sum()
    else:
        pooled = error
        if choice != "group":
            pooled = pooled.sum(1, keepdim=True)
        if choice == "tensor":
            pooled = pooled.sum(0, keepdim=True)
        if incumbent is not None:
            held = incumbent[: pooled.shape[0], : pooled.shape[1], None].long()
            pooled = pooled.scatter(-1, held, pooled.gather(-1, held) * (1 - hysteresis))
        best = pooled.argmin(-1, keepdim=True).expand(*scale.shape[:2], 1)
        chosen, total = scale.gather(-1, best)[..., 0], error.gather(-1, best).sum()
        books = best[..., 0].to(torch.uint8)
    single = len(family.books) == 1
    return Scales(chosen.contiguous(), None if single else books.contiguous(), tensor_scale, float(total))


class _Search:
    """The search for one family, scale type and method; see the module's docstring."""

    def __init__(
        self, family: Family, scale_type: ScaleType, tensor_scale: float, method: Method, percentile: float
    ) -> None:
        self.books = family.books
        self.scale_type, self.tensor_scale = scale_type, tensor_scale
        self.method = method
        self.percentile = percentile

    def run(self, chunks: Chunks, pooled: bool) -> tuple[Tensor, Tensor]:
        """Returns (error, scale), float64 and float32 of shape (units, books).

        Args:
            chunks: Elements of shape (segments, length), each with its importance or None. Every segment is a unit, or
                with ``pooled`` all segments of all chunks are one unit.
            pooled: Whether everything is one unit.
        """
        largest = [largest_of_groups(x, None) for x, _ in chunks]
        top = torch.cat(largest).amax(0, keepdim=True) if pooled else largest[0]
        empty = top == 0
        unit = torch.where(empty, 1.0, top)
        normal = [(x / unit, h) for x, h in chunks]
        starts = self._bounds(normal, pooled)
        if self.method == "mse":
            coarse = coarse_starts(self.books, normal, pooled)
            starts = [torch.cat(pair, dim=1) for pair in zip(coarse, starts, strict=True)]
        for index, book in enumerate(self.books):  # 0 becomes the smallest scale, so that the error is least
            starts[index] = torch.where(empty, 1.0 if bool((book.levels == 0).any()) else 0.0, starts[index])
        error, scale = self._refine(normal, unit[:, 0], starts, pooled)
        return error.T * unit.double() ** 2, scale.T

    def _refine(self, chunks: Chunks, unit: Tensor, starts: list[Tensor], pooled: bool) -> tuple[Tensor, Tensor]:
        """Computes the exact errors of the starting scales and refines the best: (error, scale) of (books, units)."""
        most = max(start.shape[1] for start in starts)
        tried = torch.stack([start[:, [*range(start.shape[1])] + [0] * (most - start.shape[1])] for start in starts])
        # No level may overflow, even if the type rounds the scale up: E4M3 does by up to a sixteenth.
        reach = unit.new_tensor([[max(1.0, float(np.abs(book.levels).max()))] for book in self.books])
        limit = torch.finfo(torch.float32).max / 1.07 / reach

        def better(best: _Trial | None, scales: Tensor) -> _Trial:
            for scale in scale_candidates(scales.clamp(-limit, limit), self.scale_type, self.tensor_scale):
                relative = normal_numbers(scale / unit).clamp(-_FARTHEST, _FARTHEST)
                each = zip(self.books, relative[:, :, None], strict=True)
                sums = torch.stack([_sums(chunks, book, factor, pooled) for book, factor in each], dim=1)
                best = _better(best, _Trial(scale, sums[0], (sums[1] / sums[2]).float()))
            assert best is not None
            return best

        best: _Trial | None = None
        for start in tried.unbind(-1):
            best = better(best, start * unit)
        assert best is not None
        if self.method == "mse":
            fitted = best.fitted * unit
            usable = torch.isfinite(fitted) & (fitted * best.scale > 0)
            best = better(best, torch.where(usable, fitted, best.scale))
        return best.error, best.scale

    def _bounds(self, chunks: Chunks, pooled: bool) -> list[Tensor]:
        """Returns the scales of every codebook that clip nothing, or only beyond the percentile: (units, 1 or 2).

        Args:
            chunks: Elements of magnitude 1 at most.
            pooled: Whether everything is one unit.
        """
        high = torch.cat([x.amax(1) for x, _ in chunks]).clamp(min=0)
        low = torch.cat([-x.amin(1) for x, _ in chunks]).clamp(min=0)
        if pooled:
            high, low = high.amax(0, keepdim=True), low.amax(0, keepdim=True)
        if self.method == "percentile":
            magnitudes = torch.cat([x.abs().flatten() for x, _ in chunks])[None] if pooled else chunks[0][0].abs()
            rank = max(1, math.ceil(self.percentile / 100 * magnitudes.shape[1]))
            limit = magnitudes.kthvalue(rank, dim=1).values
            limit = torch.where(limit > 0, limit, 1.0)
            high, low = torch.minimum(high, limit), torch.minimum(low, limit)
        return [torch.stack(_bound(book, high, low), dim=-1) for book in self.books]


def largest_of_groups(matrix: Tensor, group_size: int | None) -> Tensor:
    """Returns the largest magnitude of every group of columns: (rows, groups), with one group for None."""
    parts = []
    for start, groups, length in spans(matrix.shape[1], group_size):
        part = matrix[:, start : start + groups * length].unflatten(1, (groups, length))
        parts.append(torch.maximum(part.amax(2), -part.amin(2)))
    return torch.cat(parts, dim=1)


class _Trial(NamedTuple):
    """Scales with their errors: all of shape (books, units)."""

    scale: Tensor
    error: Tensor
    fitted: Tensor  # the least-squares scale for the codes at this scale, relative to the largest magnitude


def _better(best: _Trial | None, trial: _Trial) -> _Trial:
    if best is None:
        return trial
    better = trial.error < best.error
    return _Trial(*(torch.where(better, new, old) for new, old in zip(trial, best, strict=True)))


def _bound(book: Codebook, high: Tensor, low: Tensor) -> list[Tensor]:
    """Returns the scales that map -low … high into the codebook's range: positive, and negative if allowed.

    A side without levels is ignored, since its elements cannot be represented.
    """
    top, bottom = float(book.levels[-1]), -float(book.levels[0])

    def fit(positive: Tensor, negative: Tensor) -> Tensor:
        sides = [side / reach for side, reach in ((positive, top), (negative, bottom)) if reach > 0]
        scale = torch.stack(sides).amax(0)
        return torch.where(scale > 0, scale, 1 / max(top, bottom))  # everything is clipped to zero at any scale

    return [fit(high, low), -fit(low, high)] if scale_has_sign(book) else [fit(high, low)]


def _sums(chunks: Chunks, book: Codebook, scale: Tensor, pooled: bool) -> Tensor:
    """Computes the exact error and the sums for a least-squares step, of every unit or of all, at scales (units, 1).

    Returns:
        float64 of shape (3, units): the sums of the squared error, of value · x and of value², all weighted.
    """
    totals = [fit(book, x, h, scale) for x, h in chunks]
    return torch.stack([sums.sum(1, keepdim=True) for sums in totals]).sum(0) if pooled else totals[0]


def choose_reach(rows: Tensor, family: Family) -> tuple[Codebook, float]:
    """Chooses the codebook and the reach of dynamically scaled rows by the least squared error.

    Args:
        rows: float32 of shape (rows, columns); each row is scaled so that its largest magnitude becomes the reach.
        family: The codebooks to choose from.

    Returns:
        The codebook, and the reach: a value between the codebook's median level and slightly above its largest.
    """
    largest = largest_of_groups(rows, None)
    normal = rows / torch.where(largest > 0, largest, 1.0)
    exponent = torch.frexp(largest.max()).exponent  # keeps squares of very large or small rows within float32
    weights = torch.ldexp(largest, -exponent).square().expand_as(normal)
    best: tuple[float, Codebook, float] | None = None
    for book in family.books:
        for reach in reaches(book, 0.5):
            unit = normal.new_full((1, 1), 1 / reach)
            error = float(_sums([(normal, weights)], book, unit, pooled=True)[0])
            if best is None or error < best[0]:
                best = error, book, reach
    assert best is not None
    return best[1:]


def _e4m3_factor(matrix: Tensor, books: tuple[Codebook, ...]) -> float:
    """Returns the factor of E4M3 scales at which every codebook can hold the largest magnitude."""
    top = max((float(block.abs().max()) for block, _ in _row_blocks(matrix, None)), default=0.0)
    one = torch.ones((), dtype=torch.float32, device="cpu")
    bound = min(float(torch.stack(_bound(book, one, one)).abs().min()) for book in books)
    return e4m3_factor(top * max(bound, *(1 / float(np.abs(book.levels).max()) for book in books)))


def _largest_wanted(
    matrix: Tensor,
    family: Family,
    importance: Tensor | None,
    granularity: Granularity,
    group_size: int | None,
    choice_granularity: Granularity,
) -> float:
    """Returns the largest scale that the search would choose if scales could be any number.

    It can exceed the scale at which nothing is clipped: a tapered codebook is finest at small values.
    """
    if granularity != "tensor":
        rows = largest_of_groups(matrix, None)[:, 0].topk(min(_TOP_ROWS, len(matrix))).indices
        matrix, importance = (
            matrix[rows],
            importance[rows] if importance is not None and len(importance) > 1 else importance,
        )
    scale = choose_scales(
        matrix,
        family,
        granularity=granularity,
        group_size=group_size,
        choice_granularity=choice_granularity,
        importance=importance,
    ).scale
    used = largest_of_groups(matrix, group_size) > 0
    return float((scale.abs() * (used.any() if granularity == "tensor" else used)).max())


def _normalized(importance: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the importance as float32 of mean one and shape (1 or rows, columns), with a lower bound.

    The bound gives units whose inputs were all zero in calibration a reasonable scale.
    """
    h = importance.float()
    if tuple(h.shape) not in ((columns,), (1, columns), (rows, columns)):
        raise DyBitError(f"importance must have shape ({columns},) or ({rows}, {columns}), not {tuple(h.shape)}")
    if not bool(torch.isfinite(h).all()) or bool((h < 0).any()):
        raise DyBitError(f"importance must be finite and at least 0, but is {float(h.min())} to {float(h.max())}")
    h = h if h.ndim == 2 else h[None]
    h = h / h.max().clamp(min=TINIEST)  # else the mean of large numbers could overflow
    return h / h.mean().clamp(min=TINIEST) + 1e-6


def _row_blocks(matrix: Tensor, importance: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields blocks of whole rows with about _BLOCK elements."""
    rows = max(1, _BLOCK // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        block = matrix[start : start + rows]
        if importance is None:
            yield block, None
        else:
            h = importance if importance.shape[0] == 1 else importance[start : start + rows]
            yield block, h.expand(block.shape).contiguous()


def _check(
    matrix: Tensor, granularity: str, group_size: int | None, choice: str, method: str, percentile: float
) -> None:
    if matrix.ndim != 2 or not matrix.is_floating_point() or matrix.numel() == 0:
        raise DyBitError(
            f"matrix must be floating point of shape (rows, columns), not empty, "
            f"but is {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    if granularity not in GRANULARITIES or choice not in GRANULARITIES:
        raise DyBitError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r} or {choice!r}")
    if GRANULARITIES.index(choice) > GRANULARITIES.index(granularity):
        raise DyBitError(f"choice_granularity={choice!r} is finer than granularity={granularity!r}")
    if (group_size is not None) != (granularity == "group") or (group_size is not None and group_size < 1):
        raise DyBitError(f"group_size={group_size} does not fit granularity={granularity!r}")
    if method not in METHODS:
        raise DyBitError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if not 0 < percentile <= 100:
        raise DyBitError(f"percentile must be above 0 and at most 100, not {percentile}")
