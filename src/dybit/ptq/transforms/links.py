"""Finds which layers feed which, channel by channel, so that a factor can move from one to the other.

Works on floating-point models.

A channel of a layer's output may be divided by a factor, and the weights that read it multiplied by the same, if all
that happens in between commutes with the factor and nobody else looks. What happens in between is followed while the
model runs once: every channel of every possible producer gets a number, the numbers go through the same operators as
the values, and an operator that is not known to commute ends the search for that producer. So a reshape, a transpose
or the repetition of heads needs no rule of its own, and what is not understood is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from dybit.layers.kinds import channel_dim, transposed, weight_names
from dybit.models.running import evaluating, run_batch, tensors_of, without_fast_path

_ANY = -1  # the number of an element that is zero, whatever its channel is scaled by
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_aten: Any = torch.ops.aten

# Operators that move elements: the numbers go the same way.
_VIEWS = {_aten.view, _aten._unsafe_view, _aten._reshape_alias}
_MOVES = {
    _aten.permute, _aten.transpose, _aten.t, _aten.expand, _aten.slice, _aten.select, _aten.squeeze, _aten.unsqueeze,
    _aten.clone, _aten.alias, _aten.detach, _aten.unbind, _aten.split, _aten.split_with_sizes, _aten.repeat, _aten.flip,
    _aten.roll, _aten.index_select, _aten.pixel_shuffle, _aten.unfold, _aten.unsafe_split,
}  # fmt: skip
# Functions f of one element with f(s·x) = s·f(x) for positive s.
_HOMOGENEOUS = {
    _aten.relu, _aten.relu_, _aten.leaky_relu, _aten.leaky_relu_, _aten._prelu_kernel, _aten.neg, _aten.abs,
    _aten._to_copy,
}  # fmt: skip
_POOLS = {
    _aten.avg_pool2d: 2,
    _aten._adaptive_avg_pool2d: 2,
    _aten.max_pool2d_with_indices: 2,
}  # over so many dimensions
_REDUCTIONS = {_aten.mean, _aten.amax}
_MIXING = {_aten.avg_pool2d, _aten._adaptive_avg_pool2d, _aten.mean, _aten.bmm}
_CLIPS = {_aten.hardtanh, _aten.hardtanh_, _aten.clamp, _aten.clamp_, _aten.clamp_min, _aten.clamp_min_}
_SHAPE_ONLY = {
    _aten.zeros_like, _aten.ones_like, _aten.empty_like, _aten.full_like, _aten.new_zeros, _aten.new_empty,
    _aten.new_ones, _aten.new_full, _aten.rand_like,
}  # fmt: skip


@dataclass(frozen=True)
class Link:
    """A producer of channels and all the layers that read them.

    Attributes:
        producer: Qualified name of the module with the weights, and of the norm or the scale of a norm.
        is_norm: Whether the producer is a vector of factors (the affine part of a norm), not a matrix or a kernel.
        channels: How many channels it produces.
        readers: For every reader, the producer's channel of each of its input channels: int64 of shape (inputs,); -1
            where the input is always zero.
        limit: The value at which channels are cut on the way (6 for ReLU6), or None.
    """

    producer: str
    is_norm: bool
    channels: int
    readers: Mapping[str, Tensor]
    limit: float | None = None


@dataclass
class _Source:
    """A producer while the model runs."""

    name: str
    is_norm: bool
    channels: int
    readers: dict[str, Tensor] = field(default_factory=dict)
    usable: bool = True
    limit: float | None = None


@dataclass(frozen=True)
class _Call:
    """An operator that was run, with the places of its numbered inputs among all of them."""

    func: Any
    args: Any
    kwargs: Any
    marks: list[tuple[int, _Mark]]
    result: Any


@dataclass(frozen=True)
class _Mark:
    """A tensor's producer, and the channel of every element (int32, of the tensor's shape)."""

    source: _Source
    channel: Tensor
    mixed: bool = False  # whether elements were averaged on the way: a limit no longer commutes


def find_links(model: nn.Module, batch: Any) -> list[Link]:  # noqa: ANN401
    """Runs a model on one batch and returns the links between its layers, in order of execution.

    Producers are linear layers, convolutions, and the affine parts of norms; readers are linear layers and
    convolutions. Between them may lie ReLU, LeakyReLU and ReLU6, products with other tensors (gates), pooling, padding
    with zeros, any movement of elements, and the mixing of positions by attention weights. A layer that runs twice,
    shares its weights, overrides its class's forward, or is read elsewhere is in no link; nor is a producer whose
    channels reach the model's output.

    Args:
        model: A floating-point model; run in evaluation mode without gradients, its mode restored afterwards.
        batch: A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises:
        DyBitError: The batch does not fit the model.
    """
    tracker = _Tracker(model)
    with evaluating(model), without_fast_path(), sdpa_kernel(SDPBackend.MATH), tracker.following(), tracker:
        output = run_batch(model, batch)
    for tensor in tensors_of(output):
        tracker.spoil(tensor)
    return tracker.links()


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution that computes no more than its class says."""
    kind = next((cls for cls in _PLAIN if isinstance(module, cls)), None)
    # Without a class that torch knows, transformers' Conv1D: a matrix of which the inputs are counted first.
    usual = type(module).forward is kind.forward if kind else weight_names(module) == ("weight",) and _matrix(module)
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(usual and not hooked and "weight" in module._parameters and _names(module) <= {"weight", "bias"})


def _matrix(module: nn.Module) -> bool:
    return bool(transposed(module)) and cast(Tensor, module.weight).ndim == 2


def _names(module: nn.Module) -> set[str]:
    return {name for name, parameter in module._parameters.items() if parameter is not None}


class _Tracker(TorchDispatchMode):
    """Carries the channels' numbers along while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        owners = [
            (name, key, parameter)
            for name, module in model.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        shared = Counter(id(parameter) for _, _, parameter in owners)
        self._owners = {id(p): (name, key) for name, key, p in owners if shared[id(p)] == 1}
        self._modules = dict(model.named_modules())
        self._layers = {
            name: module
            for name, module in self._modules.items()
            if is_plain(module) and all(id(p) in self._owners for p in module.parameters())
        }
        self._sources: dict[str, _Source] = {}
        self._calls: Counter[str] = Counter()
        self._marks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._inside = 0

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hooks the layers: what happens inside of one is its own business."""
        handles = []
        for name, module in self._layers.items():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def links(self) -> list[Link]:
        """The links found."""
        repeated = {name for name, count in self._calls.items() if count > 1}
        return [
            Link(s.name, s.is_norm, s.channels, s.readers, s.limit)
            for s in self._sources.values()
            if s.usable and s.readers and not repeated & {s.name, *s.readers}
        ]

    def spoil(self, tensor: object) -> None:
        """Gives up the producer of a tensor."""
        mark = self._mark(tensor)
        if mark is not None:
            mark.source.usable = False

    def _mark(self, tensor: object) -> _Mark | None:
        return cast("_Mark | None", self._marks.get(tensor)) if isinstance(tensor, Tensor) else None

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside += 1
            self._calls[name] += 1
            (x,) = (*args, *kwargs.values())
            mark = self._mark(x)
            if mark is None:
                return
            index = _along(mark.channel, channel_dim(module, x))
            if index is None:
                mark.source.usable = False
            else:
                mark.source.readers[name] = index.long()

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._inside -= 1
            self._produce(name, False, output, channel_dim(module, output))

        return hook

    def _produce(self, name: str, is_norm: bool, output: Tensor, dim: int) -> None:
        if is_norm:
            self._calls[name] += 1
        source = self._sources[name] = _Source(name, is_norm, output.shape[dim])
        shape = [-1 if i == dim else 1 for i in range(output.ndim)]
        number = torch.arange(source.channels, dtype=torch.int32, device=output.device).view(shape)
        self._marks[output] = _Mark(source, number.expand(output.shape))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Runs an operator as it is, then carries the numbers of its inputs to its outputs."""
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        flat, _ = tree_flatten((args, kwargs))
        # Before the operator runs: in-place ones return the tensor that they were given.
        marks = [(i, mark) for i, x in enumerate(flat) if (mark := self._mark(x)) is not None]
        result = func(*args, **kwargs)
        norm = self._norm(func.overloadpacket, args)
        for x in flat:  # weights that are read by other means than calling their module
            owned = self._owners.get(id(x))
            if owned and owned[0] != norm:
                self._calls[owned[0]] += 2
        if norm is not None:
            for _, mark in marks:
                mark.source.usable = False
            output = result[0] if isinstance(result, tuple) else result
            self._produce(norm, True, output, output.ndim - 1)
        elif marks and func.overloadpacket not in _SHAPE_ONLY:
            self._carry(_Call(func, args, kwargs, marks, result))
        return result

    def _norm(self, packet: Any, args: Any) -> str | None:  # noqa: ANN401
        """The module whose vector of factors an operator multiplies into the last dimension, if it does."""
        weight: Any = None
        if packet in (_aten.native_layer_norm, _aten._fused_rms_norm) and len(args[1]) == 1:
            weight, allowed = args[2], {"weight", "bias"}
        elif packet is _aten.mul and all(isinstance(x, Tensor) for x in args):
            weight, x = args if id(args[0]) in self._owners else args[::-1]
            allowed = {"weight"} if weight.ndim == 1 < x.ndim and x.shape[-1] == weight.numel() else set()
        owned = self._owners.get(id(weight))
        return owned[0] if owned and owned[1] == "weight" and _names(self._modules[owned[0]]) <= allowed else None

    def _carry(self, call: _Call) -> None:
        """Numbers the outputs of an operator that has numbered inputs, or gives their producers up."""
        source = call.marks[0][1].source
        numbers = self._through(call) if all(mark.source is source for _, mark in call.marks) else None
        outputs = [x for x in tree_leaves(call.result) if isinstance(x, Tensor)]
        if numbers is None or not outputs or not outputs[0].is_floating_point():
            for _, mark in call.marks:
                mark.source.usable = False
            return
        mixed = call.func.overloadpacket in _MIXING or any(mark.mixed for _, mark in call.marks)
        for tensor, number in zip(outputs, tree_leaves(numbers), strict=False):
            self._marks[tensor] = _Mark(source, number, mixed)

    def _through(self, call: _Call) -> Any:  # noqa: ANN401  # a tensor or several, as the operator
        """The channels of an operator's outputs, or None where it may not commute with factors."""
        packet, args, result, (place, mark) = call.func.overloadpacket, call.args, call.result, call.marks[0]
        number, alone = mark.channel, len(call.marks) == 1
        if packet is _aten.cat:
            return self._cat(args)
        if packet is _aten.mul and alone:
            return number.expand(result.shape) if number.ndim == result.ndim else None
        if packet is _aten.bmm and alone and place == 1:  # positions mixed by attention weights
            row = _constant(number, 1)
            return None if row is None else row.expand(result.shape)
        if not alone or place:
            return None
        if packet in (_aten.div, _aten.mul_, _aten.div_) or packet in _HOMOGENEOUS:
            return number if number.shape == result.shape else None
        if packet in _VIEWS:
            return None if isinstance(args[1], torch.dtype) else number.reshape(result.shape)
        if packet in _MOVES:
            options = {key: x for key, x in call.kwargs.items() if key != "memory_format"}
            return call.func(number, *args[1:], **options)
        if packet is _aten.constant_pad_nd and (len(args) < 3 or args[2] == 0):
            return call.func(number, args[1], _ANY)
        if packet in _CLIPS:
            return number if self._clip(packet, args, call.kwargs, mark) else None
        if packet in _POOLS:
            return _pooled(number, result)
        return _reduced(number, *args[1:]) if packet in _REDUCTIONS and len(args) > 1 else None

    def _cat(self, args: Any) -> Tensor | None:  # noqa: ANN401
        """Concatenation: of parts that are all numbered, or empty, as a cache is before its first use."""
        marks = [self._mark(part) for part in args[0] if part.numel()]
        if any(mark is None for mark in marks):
            return None
        return torch.cat([mark.channel for mark in marks if mark is not None], *args[1:])

    def _clip(self, packet: Any, args: Any, kwargs: Any, mark: _Mark) -> bool:  # noqa: ANN401
        """Notes the limit of a clip from zero upwards; whether the search may go on."""
        names = ("min_val", "max_val") if packet in (_aten.hardtanh, _aten.hardtanh_) else ("min", "max")
        low, high = (args[i + 1] if len(args) > i + 1 else kwargs.get(key) for i, key in enumerate(names))
        if isinstance(low, Tensor) or isinstance(high, Tensor) or low != 0:
            return False
        if high is None:
            return True
        if mark.mixed or mark.source.limit is not None or mark.source.is_norm:
            return False
        mark.source.limit = float(high)
        return True


def _constant(number: Tensor, dim: int) -> Tensor | None:
    """The numbers without a dimension (kept with size 1), if they are the same all along it."""
    if not number.numel():
        return None
    high = number.amax(dim, keepdim=True)
    return high if bool(((number == high) | (number == _ANY)).all()) else None


def _along(number: Tensor, dim: int) -> Tensor | None:
    """The numbers of one dimension, if all others make no difference: int32 of shape (size of ``dim``,)."""
    if not number.numel():
        return None
    row = _constant(number.movedim(dim, -1).reshape(-1, number.shape[dim]), 0)
    return None if row is None else row[0]


def _pooled(number: Tensor, result: Any) -> Tensor | None:  # noqa: ANN401
    """The numbers after two-dimensional pooling."""
    row = _reduced(number, [-2, -1], True)
    return None if row is None else row.expand(result[0].shape if isinstance(result, tuple) else result.shape)


def _reduced(number: Tensor, dims: Any, keepdim: bool = False) -> Tensor | None:  # noqa: ANN401
    """The numbers after a reduction over dimensions along which they are the same."""
    dims = [dim % number.ndim for dim in ([dims] if isinstance(dims, int) else dims or range(number.ndim))]
    row: Tensor | None = number
    for dim in dims:
        row = None if row is None else _constant(row, dim)
    return row if row is None or keepdim else row.squeeze(dims)
