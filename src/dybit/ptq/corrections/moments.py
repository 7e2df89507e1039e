"""Second moments of a layer's inputs on calibration batches, from sampled patches.

The squared error of a layer's outputs is a quadratic form of its weights, whose
matrix holds the second moments of the inputs: a patch for convolutions, which are matrix products of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dybit.errors import DyBitError
from dybit.layers.kinds import channel_groups
from dybit.layers.quantized import Quantized, is_linear
from dybit.ptq.corrections.lockstep import Call

_POSITIONS = 1 << 15  # of all calls together
_PATCH_ELEMENTS = 1 << 25  # bounds the memory of a layer's patches
_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
_TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}


@dataclass
class Moments:
    """Means and centred second moments of a layer's rounded inputs x and wanted outputs y, by channel group.

    Attributes:
        mean: Of x: float64 of shape (groups, columns).
        wanted: Of y: float64 of shape (groups, rows / groups).
        second: Of x with x: float32 of shape (groups, columns, columns).
        cross: Of y with x: float32 of shape (groups, rows / groups, columns).
        power: Of y with itself: float32 of shape (groups, rows / groups).
        count: Positions.
    """

    mean: Tensor
    wanted: Tensor
    second: Tensor
    cross: Tensor
    power: Tensor
    count: int


def measure(
    layer: Quantized,
    reference: nn.Module,
    calls: Sequence[Call],
    originals: Sequence[Call],
    generator: torch.Generator,
) -> Moments | None:
    """Samples positions of a layer's calls in both models.

    Args:
        layer: The quantized layer, whose inputs are rounded as it does.
        reference: The floating-point layer, which says what outputs are wanted.
        calls: In the quantized model.
        originals: In the floating-point model, of the same shapes.
        generator: Draws the positions.

    Returns:
        The moments, or None if the layer's forward is no product or convolution with its weight.

    Raises:
        DyBitError: Inputs hold NaN or infinity.
    """
    groups = channel_groups(layer)
    columns = layer.weight_specs["weight"].columns
    limit = max(1, min(_POSITIONS, _PATCH_ELEMENTS // (columns * groups)) // len(calls))
    weight = layer.weight_specs["weight"].to_matrix(reference.get_parameter("weight").detach().float())
    bias = reference._parameters.get("bias")
    x_parts, y_parts = [], []
    for call, original in zip(calls, originals, strict=True):
        product, other = product_of(layer, call), product_of(reference, original)
        if product is None or other is None:
            return None
        chosen = product.draw(limit, generator)
        x_parts.append(product.patches(chosen))
        wanted = torch.einsum("ngk,grk->ngr", other.patches(chosen), weight.view(groups, -1, columns))
        y_parts.append(wanted)
    x, y = torch.cat(x_parts), torch.cat(y_parts)
    if bias is not None:
        y = y + bias.detach().float().view(groups, -1)
    if not bool(torch.isfinite(x.sum())) or not bool(torch.isfinite(y.sum())):
        raise DyBitError("calibration gives it inputs with NaN or infinity")
    return _moments(x, y)


def _moments(x: Tensor, y: Tensor) -> Moments:
    """From x (positions, groups, columns) and y (positions, groups, rows / groups)."""
    count = x.shape[0]
    mean, wanted = x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64)
    x, y = (x - mean.float()).transpose(0, 1), (y - wanted.float()).transpose(0, 1)
    second = x.transpose(1, 2) @ x / count
    cross = y.transpose(1, 2) @ x / count
    return Moments(mean, wanted, second, cross, y.square().mean(1), count)


@dataclass
class Product:
    """The inputs of a matrix product or convolution, from which patches can be taken.

    Attributes:
        x: (batch, channels, positions), padded and, for transposed convolutions, spread out.
        starts: Flat positions in ``x`` at which patches start: int64 of shape (outputs,).
        offsets: Flat positions of a patch's elements from there: int64 of shape (kernel,).
        groups: Channel groups.
    """

    x: Tensor
    starts: Tensor
    offsets: Tensor
    groups: int

    def draw(self, limit: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample and output position of up to ``limit`` patches, drawn at random."""
        total = self.x.shape[0] * self.starts.numel()
        if total > limit:
            index = torch.randperm(total, generator=generator, dtype=torch.int64, device="cpu")[:limit]
        else:
            index = torch.arange(total, dtype=torch.int64, device="cpu")
        return index // self.starts.numel(), index % self.starts.numel()

    def patches(self, chosen: tuple[Tensor, Tensor]) -> Tensor:
        """The patches: float32 of shape (patches, groups, columns)."""
        sample, place = chosen
        index = self.starts[place][:, None] + self.offsets
        read = self.x[sample[:, None], :, index]  # (patches, kernel, channels)
        taken: Tensor = read.unflatten(2, (self.groups, -1)).permute(0, 2, 3, 1)
        return taken.flatten(2).float()


class _Taken(Exception):
    """Carries the arguments of the product out of a layer's forward."""

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments


class _Take(TorchFunctionMode):
    """Stops a forward at its first product, whatever it has done to the inputs before."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  # as torch's own
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        names: tuple[str, ...] = ()
        if func in _CONVOLUTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        elif func in _TRANSPOSED:
            names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        elif func is functional.linear:
            names = ("input", "weight", "bias")
        if names:
            raise _Taken(func, {**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


def product_of(layer: nn.Module, call: Call) -> Product | None:
    """The product that a layer computes; None if it computes another."""
    if is_linear(layer):  # the quantized one multiplies by its codes
        (x,) = (*call.args, *call.kwargs.values())
        return _rows(layer.round_input(x) if isinstance(layer, Quantized) else x)
    try:
        with _Take():
            if isinstance(layer, Quantized):  # the layer's own forward, where kernels would take its place
                Quantized.forward(layer, *call.args, **call.kwargs)
            else:
                layer.forward(*call.args, **call.kwargs)
    except _Taken as taken:
        if taken.function is functional.linear:
            return _rows(taken.arguments["input"])
        return _convolution(taken.arguments, taken.function in _TRANSPOSED)
    return None


def _rows(x: Tensor) -> Product:
    flat = x.reshape(1, -1, x.shape[-1]).transpose(1, 2)
    starts = torch.arange(flat.shape[2], dtype=torch.int64, device="cpu")
    return Product(flat, starts, torch.zeros_like(starts[:1]), 1)


def _convolution(arguments: dict[str, Any], is_transposed: bool) -> Product:
    x, weight = arguments["input"], arguments["weight"]
    spatial = weight.ndim - 2
    x = x if x.ndim == weight.ndim else x[None]
    kernel = weight.shape[2:]

    def each(name: str, default: int) -> list[int]:
        value = arguments.get(name, default)
        values = list(value) if isinstance(value, Sequence) else [value]
        return values * spatial if len(values) == 1 else values

    stride, dilation = each("stride", 1), each("dilation", 1)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if is_transposed:
        x, pads = _spread(x, stride, reach, each("padding", 0), each("output_padding", 0))
        stride = [1] * spatial
    elif arguments.get("padding") == "same":
        pads = [(r // 2, r - r // 2) for r in reach]
    elif arguments.get("padding") == "valid":
        pads = [(0, 0)] * spatial
    else:
        pads = [(p, p) for p in each("padding", 0)]
    x = functional.pad(x, [side for pair in reversed(pads) for side in pair])
    sizes = x.shape[2:]
    outputs = [range(0, n - r, s) for n, r, s in zip(sizes, reach, stride, strict=True)]
    inside = [range(0, r + 1, d) for r, d in zip(reach, dilation, strict=True)]
    offsets = _flat(inside, sizes)
    groups = int(arguments.get("groups", 1))
    # A transposed convolution is one of the spread input with the kernel turned round.
    offsets = offsets.flip(0) if is_transposed else offsets
    return Product(x.flatten(2), _flat(outputs, sizes), offsets, groups)


def _spread(
    x: Tensor, stride: list[int], reach: list[int], padding: list[int], extra: list[int]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The input of a transposed convolution with zeros between its elements, and the padding that it then needs."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    places: list[Any] = [slice(None, None, s) for s in stride]
    spread[(..., *places)] = x
    return spread, [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]


def _flat(ranges: list[range], sizes: Sequence[int]) -> Tensor:
    """Flat positions of a grid in an array of some sizes, the last dimension fastest."""
    flat = torch.zeros(1, dtype=torch.int64, device="cpu")
    for steps, size in zip(ranges, sizes, strict=True):
        flat = (flat[:, None] * size + torch.tensor(list(steps), dtype=torch.int64, device="cpu")).flatten()
    return flat
