"""Hessians of layers: the second moments of everything that a weight multiplies, gathered as a model runs.

The Hessian of a weight is the mean of x xᵀ over the positions (tokens, pixels) of its
inputs, x holding what the columns of the weight's matrix multiply: features, or patches of an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from dybit.layers.kinds import channel_groups, transposed
from dybit.models.running import check_finite, positions
from dybit.operators.packed_cache import Snapshot
from dybit.tensors.quantized_tensor import TensorSpec

_CHUNK = 1 << 23  # elements of patches at once


@dataclass(eq=False)
class _Moment:
    """A running mean of x xᵀ: float32 of shape (parts, columns, columns)."""

    owner: tuple[str, int]
    mean: Tensor | None = None
    count: int = 0
    seen: list[Snapshot] = field(default_factory=list)  # inputs that are counted in

    def has(self, x: Tensor) -> bool:
        """Whether an input that still exists is counted in."""
        return any(snapshot.holds({"x": x}) for snapshot in self.seen)

    def add(self, x: Tensor, chunks: Iterator[Tensor]) -> None:
        self.seen = [snapshot for snapshot in self.seen if snapshot.alive]
        self.seen.append(Snapshot({"x": x}))
        for rows in chunks:
            total = self.count + rows.shape[1]
            if self.mean is None:
                self.mean = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
            # A mean and not a sum, which could leave the range of float32.
            rows = rows / math.sqrt(total)
            self.mean.mul_(self.count / total).baddbmm_(rows.mT, rows)
            self.count = total


class Hessians:
    """Gathers the Hessians of some layers, to be passed to :func:`dybit.models.running.observing`.

    Layers that are given the very same input (query, key and value; gate and up) share one.
    """

    def __init__(self) -> None:
        self._moments: dict[tuple[str, int], _Moment] = {}  # by layer and number of the input

    def observe(self, name: str, module: nn.Module, inputs: list[Tensor]) -> None:
        """Counts the inputs of a call in.

        Raises:
            DyBitError: They hold NaN or infinity.
        """
        for index, x in enumerate(inputs):
            if not x.numel():
                continue
            key = name, index
            mine = self._moments.get(key)
            shared = self._shared(x, module)
            if shared is not None and (mine is None or mine is shared):
                self._moments[key] = shared
                continue
            if mine is not None and mine.owner != key:
                # The inputs were the same until now, but for the call of the other that may have come just before.
                mine = _Moment(key, None if mine.mean is None else mine.mean.clone(), mine.count)
            mine = mine or _Moment(key)
            self._moments[key] = mine
            mine.add(x, design(name, module, x))

    def _shared(self, x: Tensor, module: nn.Module) -> _Moment | None:
        """The moment that counts an input already, of a layer that looks at it in the same way."""
        if channel_groups(module) != 1 or _is_convolution(module):
            return None
        return next((moment for moment in self._moments.values() if moment.has(x)), None)

    def of(self, name: str, weight: str, spec: TensorSpec, *, shrinkage: float | None = None) -> Tensor | None:
        """The Hessian of a weight.

        Args:
            name: The layer's.
            weight: The weight's.
            spec: How the weight is stored.
            shrinkage: Returns an estimate for inputs that were not seen, shrunk by this share at least (see
                :func:`shrink`). None returns the Hessian of those that were.

        Returns:
            float32 of shape (parts, columns, columns), or None where the layer was never reached or the channels of its
            inputs are not those of the weight: a subclass has put something between them.
        """
        indices = {"in_proj_weight": [0, 1, 2], "k_proj_weight": [1], "v_proj_weight": [2]}.get(weight, [0])
        # Self-attention of a subclass may have one argument only.
        moments = [self._moments.get((name, index), self._moments.get((name, 0))) for index in indices]
        found = list(dict.fromkeys(moments)) if len(set(moments)) == 1 else moments
        means = [
            moment.mean if shrinkage is None else shrink(moment.mean, moment.count, shrinkage)
            for moment in found
            if moment is not None and moment.mean is not None
        ]
        if len(means) < len(found):
            return None
        if any(mean.shape[1] != spec.columns or spec.rows % (len(means) * mean.shape[0]) for mean in means):
            return None
        return torch.cat(means)


def shrink(mean: Tensor, count: int, least: float = 0.0) -> Tensor:
    """Shrinks means of x xᵀ towards their diagonals, the more the fewer x there were and the less they are correlated.

    Correlations that few samples show are mostly chance, and what makes up for errors by them adds to the errors on
    other inputs. How much to shrink is the oracle-approximating estimate of Chen et al. (IEEE TSP, 2010), applied to
    correlations, since the channels' own moments are known far better. The estimate holds for inputs like those that
    were seen; inputs of another kind have other correlations, for which ``least`` is.

    Args:
        mean: float32 of shape (parts, columns, columns).
        count: How many x it is the mean of.
        least: The least share of the correlations that is taken away, 0 to 1.
    """
    diagonal = mean.diagonal(dim1=1, dim2=2).double()
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    live = (diagonal > 0).sum(1).double().clamp(min=1)
    square = (mean.double() * unit[:, None] * unit[:, :, None]).square().sum((1, 2))
    excess = (square - live).clamp(min=1e-9)
    share = ((1 - 2 / live) * square + live.square()) / ((count + 1 - 2 / live) * excess)
    share = share.clamp(least, 1).float()[:, None]
    result = mean * (1 - share[:, None])
    result.diagonal(dim1=1, dim2=2).add_(share * diagonal.float())
    return result


def size(module: nn.Module, spec: TensorSpec) -> int:
    """Bytes of the Hessian of a weight, not counting that others may share it."""
    return 4 * channel_groups(module) * spec.columns**2


def design(name: str, module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Returns the inputs that the columns of a layer's weight multiply.

    Args:
        name: The layer's, for errors.
        module: The layer.
        x: An input of it.

    Yields:
        float32 of shape (parts, positions, columns), some positions at a time.

    Raises:
        DyBitError: The input holds NaN or infinity.
    """
    if not _is_convolution(module):
        yield positions(name, module, x)[None]
        return
    check_finite(name, x)
    dims = len(module.kernel_size)
    batch = x.detach().float().reshape(-1, *x.shape[-dims - 1 :])
    share = max(1, _CHUNK // max(1, batch[0].numel() * math.prod(module.kernel_size)))
    for part in batch.split(share):
        yield _patches(module, part)


def _patches(module: _ConvNd, x: Tensor) -> Tensor:
    """Patches of images (n, channels, *size): (groups, n · positions, channels of a group · kernel)."""
    dims = len(module.kernel_size)
    flip = bool(transposed(module))
    x, stride = _spread(module, x) if flip else (_padded(module, x), module.stride)
    for dim, (kernel, step, dilation) in enumerate(zip(module.kernel_size, stride, module.dilation, strict=True)):
        x = x.unfold(2 + dim, (kernel - 1) * dilation + 1, step)[..., ::dilation]
    if flip:
        x = x.flip(tuple(range(2 + dims, 2 + 2 * dims)))
    groups = channel_groups(module)
    x = x.unflatten(1, (groups, -1))  # (n, groups, channels, *positions, *kernel)
    n, _, channels = x.shape[:3]
    x = x.movedim(0, 1)  # (groups, n, channels, *positions, *kernel)
    x = x.movedim(2, 2 + dims)  # (groups, n, *positions, channels, *kernel)
    return x.reshape(groups, -1, channels * math.prod(module.kernel_size)) if n else x.reshape(groups, 0, -1)


def _padded(module: _ConvNd, x: Tensor) -> Tensor:
    amounts = module._reversed_padding_repeated_twice
    mode = module.padding_mode
    return functional.pad(x, amounts) if mode == "zeros" else functional.pad(x, amounts, mode=mode)


def _spread(module: _ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input of a transposed convolution as that of the ordinary one with the reversed kernel; its stride is 1."""
    dims = len(module.kernel_size)
    wide = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], module.stride, strict=True)]
    zeros = x.new_zeros(*x.shape[:2], *wide)
    index = (..., *(slice(None, None, step) for step in module.stride))
    zeros[index] = x  # type: ignore[index]
    amounts: list[int] = []
    padding = cast(tuple[int, ...], module.padding)  # of transposed convolutions it is never a word
    for k, d, p, extra in zip(module.kernel_size, module.dilation, padding, module.output_padding, strict=True):
        amounts = [d * (k - 1) - p, d * (k - 1) - p + extra, *amounts]
    return functional.pad(zeros, amounts), (1,) * dims


def _is_convolution(module: nn.Module) -> TypeGuard[_ConvNd]:
    return isinstance(module, _ConvNd)
