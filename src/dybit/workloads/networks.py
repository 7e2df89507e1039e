"""Layer shapes of well-known image networks, built as torchvision defines them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dybit.errors import DyBitError, suggestion
from dybit.workloads.workload import Conv, Gemm, Layer, Pair, Workload

if TYPE_CHECKING:
    pass


class _Builder:
    """Collects layers in order, carrying the shape of the running tensor."""

    def __init__(self, image: int, channels: int = 3) -> None:
        self.size: Pair = (image, image)
        self.channels = channels
        self.layers: list[Layer] = []
        self.extra = 0  # parameters outside the layers

    def conv(
        self, name: str, out: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, bias: bool = False,
        norm: bool = True, padding: int | None = None,
    ) -> None:  # fmt: skip
        """Adds a convolution with padding kernel // 2 unless told, and a norm of two parameters a channel."""
        pad = kernel // 2 if padding is None else padding
        layer = Conv(
            name, self.channels, out, self.size, (kernel,) * 2, (stride,) * 2, (pad,) * 2, groups=groups, bias=bias
        )
        self.layers.append(layer)
        self.channels, self.size = out, layer.output_size
        self.extra += 2 * out * norm

    def linear(self, name: str, m: int, k: int, n: int, bias: bool = True) -> None:
        """Adds a linear layer on m rows."""
        self.layers.append(Gemm(name, m, k, n, bias=bias))

    def attention(self, name: str, tokens: int, width: int, heads: int, windows: int = 1) -> None:
        """Adds the four products of self-attention: qkv, scores, weighted sum, projection."""
        rows, depth = tokens * windows, width // heads
        self.linear(f"{name}.qkv", rows, width, 3 * width)
        self.layers.append(Gemm(f"{name}.scores", tokens, depth, tokens, heads * windows, dynamic=True))
        self.layers.append(Gemm(f"{name}.context", tokens, tokens, depth, heads * windows, dynamic=True))
        self.linear(f"{name}.proj", rows, width, width)

    def pool(self, stride: int) -> None:
        """Shrinks the tensor by a pooling of ``stride``, rounding up."""
        self.size = (math.ceil(self.size[0] / stride), math.ceil(self.size[1] / stride))

    def done(self, name: str) -> Workload:
        """Returns the workload."""
        return Workload(name, tuple(self.layers), self.extra)


def _resnet(name: str, blocks: tuple[int, ...], bottleneck: bool) -> Workload:
    """ResNet v1.5: the stride is on the 3 × 3 convolution."""
    net = _Builder(224)
    net.conv("conv1", 64, 7, 2)
    net.pool(2)
    expansion = 4 if bottleneck else 1
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            at = f"layer{stage + 1}.{block}"
            size, channels = net.size, net.channels
            if bottleneck:
                net.conv(f"{at}.conv1", width)
                net.conv(f"{at}.conv2", width, 3, stride)
                net.conv(f"{at}.conv3", width * expansion)
            else:
                net.conv(f"{at}.conv1", width, 3, stride)
                net.conv(f"{at}.conv2", width, 3)
            if channels != width * expansion or stride > 1:
                net.size, net.channels = size, channels
                net.conv(f"{at}.downsample", width * expansion, 1, stride)
    net.linear("fc", 1, net.channels, 1000)
    return net.done(name)


def _mobilenet_v2() -> Workload:
    net = _Builder(224)
    net.conv("features.0", 32, 3, 2)
    index = 1
    # expansion, channels, blocks, stride: table 2 of the MobileNetV2 paper
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, channels, blocks, first_stride in table:
        for block in range(blocks):
            at, hidden = f"features.{index}", net.channels * expansion
            if expansion > 1:
                net.conv(f"{at}.expand", hidden)
            net.conv(f"{at}.depthwise", hidden, 3, first_stride if block == 0 else 1, groups=hidden)
            net.conv(f"{at}.project", channels)
            index += 1
    net.conv(f"features.{index}", 1280)
    net.linear("classifier", 1, 1280, 1000)
    return net.done("mobilenet_v2")


def _vit(name: str, patch: int, depth: int, width: int, heads: int) -> Workload:
    net = _Builder(224)
    net.conv("patch", width, patch, patch, bias=True, norm=False, padding=0)
    tokens = math.prod(net.size) + 1
    net.extra += width * (tokens + 1)  # position embedding and class token
    for block in range(depth):
        net.attention(f"encoder.{block}", tokens, width, heads)
        net.linear(f"encoder.{block}.mlp1", tokens, width, 4 * width)
        net.linear(f"encoder.{block}.mlp2", tokens, 4 * width, width)
        net.extra += 4 * width  # two layer norms
    net.extra += 2 * width
    net.linear("head", 1, width, 1000)
    return net.done(name)


def _convnext(name: str, depths: tuple[int, ...], widths: tuple[int, ...]) -> Workload:
    net = _Builder(224)
    net.conv("stem", widths[0], 4, 4, bias=True, padding=0)
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            net.extra += 2 * net.channels  # the norm comes before the downsampling
            net.conv(f"stage{stage}.downsample", width, 2, 2, bias=True, norm=False, padding=0)
        for block in range(depth):
            at = f"stage{stage}.{block}"
            net.conv(f"{at}.depthwise", width, 7, groups=width, bias=True)
            rows = math.prod(net.size)
            net.linear(f"{at}.mlp1", rows, width, 4 * width)
            net.linear(f"{at}.mlp2", rows, 4 * width, width)
            net.extra += width  # layer scale
    net.extra += 2 * net.channels
    net.linear("head", 1, net.channels, 1000)
    return net.done(name)


def _swin(name: str, depths: tuple[int, ...], width: int, heads: tuple[int, ...]) -> Workload:
    window = 7
    net = _Builder(224)
    net.conv("patch", width, 4, 4, bias=True, padding=0)
    side = net.size[0]
    for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        if stage:
            side //= 2
            net.linear(f"stage{stage}.merge", side * side, 4 * width, 2 * width, bias=False)
            net.extra += 8 * width  # norm of the four merged patches
            width *= 2
        for block in range(depth):
            at = f"stage{stage}.{block}"
            net.attention(at, window * window, width, head, (side // window) ** 2)
            net.linear(f"{at}.mlp1", side * side, width, 4 * width)
            net.linear(f"{at}.mlp2", side * side, 4 * width, width)
            net.extra += 4 * width + (2 * window - 1) ** 2 * head  # two norms, relative position bias
    net.extra += 2 * width
    net.linear("head", 1, width, 1000)
    return net.done(name)


def _regnet(
    name: str, depth: int, width_0: int, slope: float, ratio: float, group: int, squeeze: bool
) -> Workload:  # fmt: skip
    """RegNet: stage widths are a line quantized to powers of ``ratio`` and to multiples of 8 (equations 2 to 4)."""
    powers = [round(math.log((width_0 + slope * j) / width_0) / math.log(ratio)) for j in range(depth)]
    widths = [round(width_0 * ratio**power / 8) * 8 for power in powers]
    net = _Builder(224)
    net.conv("stem", 32, 3, 2)
    for stage, width in enumerate(sorted(set(widths))):
        grouped = min(group, width)
        width = round(width / grouped) * grouped
        for block in range(widths.count(sorted(set(widths))[stage])):
            at, entry, size = f"stage{stage}.{block}", net.channels, net.size
            if block == 0:
                net.conv(f"{at}.proj", width, 1, 2)
                net.size, net.channels = size, entry
            net.conv(f"{at}.a", width)
            net.conv(f"{at}.b", width, 3, 2 if block == 0 else 1, groups=width // grouped)
            if squeeze:
                hidden = round(entry / 4)
                net.linear(f"{at}.squeeze", 1, width, hidden)
                net.linear(f"{at}.excite", 1, hidden, width)
            net.conv(f"{at}.c", width)
    net.linear("fc", 1, net.channels, 1000)
    return net.done(name)


NETWORKS: dict[str, Callable[[], Workload]] = {
    "resnet18": lambda: _resnet("resnet18", (2, 2, 2, 2), False),
    "resnet50": lambda: _resnet("resnet50", (3, 4, 6, 3), True),
    "mobilenet_v2": _mobilenet_v2,
    "vit_b_16": lambda: _vit("vit_b_16", 16, 12, 768, 12),
    "convnext_tiny": lambda: _convnext("convnext_tiny", (3, 3, 9, 3), (96, 192, 384, 768)),
    "swin_t": lambda: _swin("swin_t", (2, 2, 6, 2), 96, (3, 6, 12, 24)),
    "regnet_x_1_6gf": lambda: _regnet("regnet_x_1_6gf", 18, 80, 34.01, 2.25, 24, False),
    "regnet_y_1_6gf": lambda: _regnet("regnet_y_1_6gf", 27, 48, 20.71, 2.65, 24, True),
}


@cache
def network(name: str) -> Workload:
    """Returns the workload of a well-known network: one image of 224 × 224, 1000 classes.

    Args:
        name: A key of ``NETWORKS``.

    Raises:
        DyBitError: There is no such network; the message names the nearest one.

    Example:
        >>> network("resnet18").parameters
        11689512
    """
    if name not in NETWORKS:
        raise DyBitError(f"network must be one of the built-in names, not {name!r}; {suggestion(name, NETWORKS)}")
    return NETWORKS[name]()


def find_workload(model: str) -> Workload:
    """Returns the workload of a built-in network's name, or of a JSON file.

    Raises:
        DyBitError: ``model`` is neither; the message names the nearest network.
    """
    if model not in NETWORKS and (model.endswith(".json") or Path(model).is_file()):
        return Workload.load(model)
    return network(model)
