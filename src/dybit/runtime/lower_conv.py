"""Rules for convolutions: images of significands between them, with additions, clamps and padding taken up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.dispatch import read_spec
from dybit.operators.images import ImageFormat, image_format, three
from dybit.operators.input_rounding import InputRounding, input_format
from dybit.operators.packed_conv import PackedConv, packed_conv_for
from dybit.runtime.layouts import is_last
from dybit.runtime.lower_tensors import limits_of, unary_number
from dybit.runtime.lowering import PLANAR, Buffer, Lowering, Place, View
from dybit.tensors.quantized_tensor import QuantizedTensor

_ATEN = torch.ops.aten
_ADDITIONS = (_ATEN.add.Tensor, _ATEN.add_.Tensor)
_ACTIVATIONS = (_ATEN.silu.default, _ATEN.hardswish.default, _ATEN.gelu.default)  # 0 stays 0
_NO_IMAGE = ((-1, 0), 1, (0, 0, 0), (0, 0, 0), 0, 0)
_NO_ROUNDING = (1, 1, True, 1.0, 0.0)


@dataclass(eq=False)
class _Conv:
    """A convolution and the nodes it takes up."""

    node: fx.Node
    weight: QuantizedTensor
    bias: Tensor | None
    geometry: ConvGeometry
    rounding: InputRounding
    source: fx.Node  # before padding
    pads: tuple[fx.Node, ...]
    addend: fx.Node | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)
    activation: int = -1  # csrc/elementwise.h: Unary
    taken: list[fx.Node] = field(default_factory=list)

    @property
    def result(self) -> fx.Node:
        return self.taken[-1] if self.taken else self.node

    @property
    def key(self) -> tuple[str, float, float | None]:
        """Convolutions with the same source and the same key share an image."""
        scale, offset = self.rounding.scale, self.rounding.offset
        return self.rounding.format, float(cast(Tensor, scale)), None if offset is None else float(offset)


class Images:
    """Lowers the convolutions of a graph.

    Args:
        lowering: The lowering.
    """

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering
        self._images: dict[tuple[fx.Node, Any], tuple[Buffer, ImageFormat]] = {}
        self._convs = {node: conv for node in lowering.nodes if (conv := self._conv(node)) is not None}
        for conv in self._convs.values():
            self._take_up(conv)
        self._by_result = {conv.result: conv for conv in self._convs.values()}
        self._consumers: dict[fx.Node, list[_Conv]] = {}
        for conv in self._convs.values():
            self._consumers.setdefault(conv.source, []).append(conv)
            lowering.take(conv.pads if all(self._only_convs(pad) for pad in conv.pads) else ())
            lowering.take(node for node in (conv.node, *conv.taken) if node is not conv.result)

    @property
    def rules(self) -> dict[Any, Callable[[fx.Node], bool]]:
        """By operator: adds the step of a convolution at the last node that it takes up."""
        return {PLANAR: self._is_only_rounded, **dict.fromkeys({node.target for node in self._by_result}, self._lower)}

    def _lower(self, node: fx.Node) -> bool:
        conv = self._by_result.get(node)
        if conv is None:
            return False
        self._emit(conv)
        return True

    def _conv(self, node: fx.Node) -> _Conv | None:
        if node.op != "call_function" or node.target is not torch.ops.dybit.conv.default:
            return None
        low = self._lowering
        args: tuple[Any, ...] = node.args
        x, *state, spec, stride, padding, dilation, groups, format, reach = args
        value = low.values[node]
        if not is_last(value) or value.dtype != torch.float32 or not is_last(low.values[x]) or not value.numel():
            return None
        weight, scale, choice, tensor_scale, bias, input_scale, input_offset = (low.tensor(part) for part in state)
        rounding = InputRounding(str(format), input_scale, input_offset, float(reach))
        if weight is None or scale is None or input_scale is None or input_format(rounding.format) is None:
            return None
        stored = QuantizedTensor(read_spec(str(spec)), weight, scale, choice, tensor_scale)
        source, pads, whole = low.source(x), [], [int(n) for n in padding]
        while rounding.keeps_zero() and (added := _zeros(source, len(whole))) is not None:
            whole = [a + b for a, b in zip(whole, added, strict=True)]
            pads.append(source)
            source = low.source(source.all_input_nodes[0])
        geometry = ConvGeometry.of(stride, whole, dilation, int(groups))
        bias = None if bias is None else bias.detach().float().contiguous()
        found = _Conv(node, stored, bias, geometry, rounding, source, tuple(pads))
        return found if packed_conv_for(stored, geometry, rounding) is not None else None

    def _take_up(self, conv: _Conv) -> None:
        """Lets a convolution take up an addition and a clamp, or an activation, that are its only users."""
        low = self._lowering
        user = self._only_user(conv.result)
        if user is not None and user.target in _ADDITIONS and not user.kwargs:
            others = [x for x in user.args if not (isinstance(x, fx.Node) and low.source(x) is conv.result)]
            other = others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None
            if other is not None and not self._rivals(conv, other):
                value = low.values[other]
                if isinstance(value, Tensor) and value.shape == low.values[user].shape and _is_float_last(value):
                    self._take(conv, user)
                    conv.addend = other
        user = self._only_user(conv.result)
        limits = None if user is None else limits_of(user)
        if user is not None and limits is not None:
            self._take(conv, user)
            conv.limits = limits
        elif user is not None and conv.addend is None and user.target in _ACTIVATIONS:
            self._take(conv, user)
            conv.activation = unary_number(user)

    def _take(self, conv: _Conv, user: fx.Node) -> None:
        """Takes up a node, and the copies before it."""
        node = user.all_input_nodes[[self._lowering.source(x) for x in user.all_input_nodes].index(conv.result)]
        copies = []
        while node is not conv.result:
            copies.append(node)
            node = node.all_input_nodes[0]
        conv.taken += [*reversed(copies), user]

    def _rivals(self, conv: _Conv, other: fx.Node) -> bool:
        """Whether the other summand is a later convolution, which then adds."""
        rival = self._convs.get(self._lowering.source(other))
        return (
            rival is not None
            and self._lowering.order[rival.node] > self._lowering.order[conv.node]
            and len(self._lowering.users(rival.node)) == 1
        )

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = self._lowering.users(node)
        return users[0] if len(users) == 1 and users[0].op == "call_function" else None

    def _only_convs(self, node: fx.Node) -> bool:
        """Whether only convolutions use a padded value."""
        return all(
            user in self._convs or (_zeros(user, 4) is not None and self._only_convs(user))
            for user in self._lowering.users(node)
        )

    def _is_only_rounded(self, node: fx.Node) -> bool:
        """Whether only convolutions use a value, which round it."""
        low = self._lowering
        return all(
            self._convs[user].source is node
            if user in self._convs
            else _zeros(user, 4) is not None and low.is_taken(user)
            for user in low.users(node)
        )

    def image_of(self, source: fx.Node, sharers: list[_Conv]) -> tuple[Buffer, ImageFormat]:
        """Returns the image of a value that some convolutions share, and rounds the value if nothing has yet."""
        low, key = self._lowering, sharers[0].key
        if (source, key) not in self._images:
            like = low.values[source]
            buffer, made = self._images[source, key] = _new_image(like, sharers)
            planar, size = source in low.planar, tuple(like.shape[2:])
            view = low.planar[source] if planar else low.view(source)
            picture, rounded = _picture(made, like.shape[1], size), made.rounded(sharers[0].rounding)
            batch = like.shape[0]

            def emit(program: Any, at: Place) -> None:  # noqa: ANN401
                program.round_image(at(view), batch, three(size), planar, rounded, (at(buffer), *picture))

            low.add("round", source, [view], [buffer], emit)
        return self._images[source, key]

    def _emit(self, conv: _Conv) -> None:
        low, result = self._lowering, conv.result
        packed = cast(PackedConv, packed_conv_for(conv.weight, conv.geometry, conv.rounding))
        low.kept.append((packed, conv))
        sharers = [other for other in self._consumers[conv.source] if other.key == conv.key]
        image, made = self.image_of(conv.source, sharers)
        x, value = low.values[conv.source], low.values[result]
        batch, size = x.shape[0], tuple(x.shape[2:])
        y = low.own(result)
        addend = None if conv.addend is None else low.view(conv.addend)
        following = self._consumers.get(result, [])
        following = [other for other in following if other.key == following[0].key]
        out, out_picture, out_rounded = None, _NO_IMAGE, _NO_ROUNDING
        if following:
            out, out_made = self._images[result, following[0].key] = _new_image(value, following)
            picture = _picture(out_made, value.shape[1], tuple(value.shape[2:]))
            out_rounded = out_made.rounded(following[0].rounding)
        source = _picture(made, x.shape[1], size)
        scale = made.rounded(conv.rounding)[3]
        depthwise = not packed.parts
        ended, offset, bias = (*conv.limits, conv.activation), conv.rounding.offset, conv.bias

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            add = program.depthwise_image if depthwise else program.conv_image
            add(
                packed.compiled,
                (at(image), *source),
                batch,
                three(size),
                scale,
                at(offset),
                at(bias),
                at(y.buffer),
                at(addend),
                ended,
                (at(out), *picture) if out is not None else out_picture,
                out_rounded,
            )

        wrote: list[Buffer | View] = [y] if out is None else [y, out]
        low.add("depthwise" if depthwise else "conv", result, [image, addend], wrote, emit)


def _new_image(like: Tensor, sharers: list[_Conv]) -> tuple[Buffer, ImageFormat]:
    border = tuple(max(sizes) for sizes in zip(*(conv.geometry.padding for conv in sharers), strict=True))
    made = image_format(sharers[0].rounding.format, border)
    shape = made.shape(like.shape[0], like.shape[1], tuple(like.shape[2:]))
    nbytes = made.dtype.itemsize
    for n in shape:
        nbytes *= n
    return Buffer(nbytes), made


def _picture(made: ImageFormat, channels: int, size: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns the extension's arguments of an image behind its place."""
    return (*made.layout, channels, made.shape(1, channels, size)[-1])


def _is_float_last(x: Tensor) -> bool:
    return x.dtype == torch.float32 and is_last(x)


def _zeros(node: fx.Node, count: int) -> list[int] | None:
    """Returns the zeros that a node adds before and after each of the last dimensions; None for other nodes."""
    if node.op != "call_function" or node.target not in (_ATEN.pad.default, _ATEN.constant_pad_nd.default):
        return None
    mode = node.args[2] if node.target is _ATEN.pad.default and len(node.args) > 2 else "constant"
    value = node.args[-1] if len(node.args) > (3 if node.target is _ATEN.pad.default else 2) else 0
    sizes: Any = node.args[1]
    if mode != "constant" or value or node.kwargs or len(sizes) > count:
        return None
    if not all(isinstance(n, int) and n >= 0 for n in sizes):
        return None
    sizes = [*sizes, *(0,) * (count - len(sizes))]
    return [n for i in range(len(sizes) - 2, -1, -2) for n in sizes[i : i + 2]]
